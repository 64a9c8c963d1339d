// Shared by the forward and the backward kernels of the selective scan.
//
//   x_t[c, n] = exp(delta_t[c] A[c, n]) x_{t-1}[c, n] + delta_t[c] u_t[c] B_t[n]
//   y_t[c]    = sum_n C_t[n] x_t[c, n] + D[c] u_t[c],   then times silu(z_t[c])
//
// Who does what: a warp is LANES_N lanes over the states times 32 / LANES_N lanes over the
// channels; a thread keeps STATES states of CHANNELS channels in registers and walks through
// time. Time is cut into chunks (the state at the start of each is kept for the backward pass)
// and chunks are grouped into segments, one block each, where batch x channels alone would leave
// the chip idle.
//
// Defined by the host: U_T (u, z, y), DELTA_T, BC_T (element types), STATES (2 or 4), LANES_N (a
// power of two), N_SHIFT (the lane bit where the state lane begins), HAS_Z, HAS_BIAS, SOFTPLUS,
// VECTORS (every row can be moved 16 bytes at a time).

constexpr int CHANNELS = 2;
constexpr int LANES_C = 32 / LANES_N;
constexpr int N_PAD = STATES * LANES_N;
constexpr int WARPS = LANES_N <= 2 ? 2 : 4;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK_C = WARPS * LANES_C * CHANNELS;
constexpr int CHUNK = 32;
constexpr int GROUP = 8;  // steps whose sums over the states are formed together, forward
constexpr int OCTET = 8;  // steps whose sums over the channels are formed together, backward
constexpr int PAIRS = BLOCK_C / CHANNELS;  // a block's channels, two by two
constexpr int OWNED = LANES_N >= GROUP ? 1 : GROUP / LANES_N;
// Half-precision inputs: states at the chunks' starts, and parts of dB and dC, in bfloat16.
constexpr bool HALF = sizeof(BC_T) == 2 && sizeof(U_T) == 2;
template <bool> struct PartOf { using type = float; };
template <> struct PartOf<true> { using type = bf16; };
using Part = PartOf<HALF>::type;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

struct Params {
  const void *u, *delta, *z, *B, *C;
  const float *A, *D, *bias, *initial;
  void* y;
  float* last;        // (b, d, n)
  void* checkpoints;  // (b, chunks, d, N_PAD) of Part
  float *segment_state, *segment_time;  // (b, segments, d, N_PAD); (b, segments, d)
  const void* dy;
  const float* dlast;
  void *du, *ddelta, *dz;
  float *dinitial, *dparams;  // (b, d, n); (b, segments, d, N_PAD + 2)
  void* dbc;                  // (d blocks, b, l, 2 N_PAD): dB and dC of each block of channels
  void *dB, *dC;
  long long u_b, u_l, delta_b, delta_l, z_b, z_l, B_b, B_l, C_b, C_l, dy_b, dy_l;
  int b, l, d, n, chunks, segments, chunks_per_segment;
};

// A thread's STATES neighbouring states in a row of N_PAD.
__device__ __forceinline__ void load_states(const float* row, int lane_n, float (&x)[STATES]) {
  if constexpr (STATES == 4) {
    float4 v = reinterpret_cast<const float4*>(row)[lane_n];
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    float2 v = reinterpret_cast<const float2*>(row)[lane_n];
    x[0] = v.x, x[1] = v.y;
  }
}

__device__ __forceinline__ void store_states(float* row, int lane_n, const float (&x)[STATES]) {
  if constexpr (STATES == 4)
    reinterpret_cast<float4*>(row)[lane_n] = make_float4(x[0], x[1], x[2], x[3]);
  else
    reinterpret_cast<float2*>(row)[lane_n] = make_float2(x[0], x[1]);
}

struct alignas(2 * STATES) HalfStates { bf16 x[STATES]; };

__device__ __forceinline__ void load_states(const bf16* row, int lane_n, float (&x)[STATES]) {
  HalfStates v = reinterpret_cast<const HalfStates*>(row)[lane_n];
#pragma unroll
  for (int j = 0; j < STATES; ++j) x[j] = to_float(v.x[j]);
}

__device__ __forceinline__ void store_states(bf16* row, int lane_n, const float (&x)[STATES]) {
  HalfStates v;
#pragma unroll
  for (int j = 0; j < STATES; ++j) put(v.x[j], x[j]);
  reinterpret_cast<HalfStates*>(row)[lane_n] = v;
}

struct Place {  // where this thread works
  int lane, warp, lane_n, lane_c, batch, block, segment;
  int local_c;    // first of its CHANNELS channels, within the block
  int channel;    // the same, within d
  int begin, end;  // its segment's time steps
};

__device__ __forceinline__ Place locate(const Params& p) {
  Place w;
  int blocks = (p.d + BLOCK_C - 1) / BLOCK_C;
  w.lane = threadIdx.x & 31;
  w.warp = threadIdx.x >> 5;
  w.lane_n = (w.lane >> N_SHIFT) % LANES_N;
  w.lane_c = w.lane % (1 << N_SHIFT) + (w.lane >> N_SHIFT) / LANES_N * (1 << N_SHIFT);
  w.batch = blockIdx.x / blocks;
  w.block = blockIdx.x % blocks;
  w.segment = blockIdx.y;
  w.local_c = (w.warp * LANES_C + w.lane_c) * CHANNELS;
  w.channel = w.block * BLOCK_C + w.local_c;
  w.begin = w.segment * p.chunks_per_segment * CHUNK;
  w.end = min(p.l, w.begin + p.chunks_per_segment * CHUNK);
  return w;
}

// log(1 + e^x). Where delta has half precision log(1 + e) is e times a polynomial, within 9e-6 of it
// for e <= 1: cheaper than a logarithm, and it loses no digits where e is small.
__device__ __forceinline__ float softplus(float x) {
  if (sizeof(DELTA_T) == 2) {
    float e = exp2_fast(-fabsf(x) * LOG2_E);
    float ratio = 0.9999916f + e * (-0.49936136f + e * (0.32520667f + e * (-0.21004868f +
                  e * (0.10122227f - e * 0.02386914f))));
    return fmaxf(x, 0.f) + e * ratio;
  }
  float e = exp2_fast(x * LOG2_E);
  float series = e * (1.f + e * (-1.f / 2 + e * (1.f / 3 + e * (-1.f / 4 + e * (1.f / 5 +
                 e * (-1.f / 6 + e * (1.f / 7)))))));
  float value = e < 0.125f ? series : LN_2 * log2_fast(1.f + e);
  return x > 20.f ? x : value;
}

// d softplus(x) / dx = 1 - exp(-softplus(x)), from the softplus alone.
__device__ __forceinline__ float softplus_slope(float s) {
  float series = s * (1.f - s * (1.f / 2) * (1.f - s * (1.f / 3) * (1.f - s * (1.f / 4) *
                 (1.f - s * (1.f / 5) * (1.f - s * (1.f / 6))))));
  return s < 0.25f ? series : 1.f - exp2_fast(-s * LOG2_E);
}

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.f + exp2_fast(-x * LOG2_E));
}

// Sum v[0..STEPS) over the LANES_N lanes of a channel. Each exchange halves what a lane still
// carries, so lane i ends with the sums of the steps first_owned(i) + 0, 1, ...
template <int STEPS>
__device__ __forceinline__ void sum_over_states(float (&v)[STEPS], int lane) {
#pragma unroll
  for (int bit = 1 << N_SHIFT, count = STEPS; bit < LANES_N << N_SHIFT; bit *= 2) {
    if (count > 1) {
      count /= 2;
      bool upper = lane & bit;
#pragma unroll
      for (int i = 0; i < STEPS / 2; ++i) {
        if (i < count) {
          float give = upper ? v[i] : v[i + count];
          float keep = upper ? v[i + count] : v[i];
          v[i] = keep + __shfl_xor_sync(0xffffffffu, give, bit);
        }
      }
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], bit);
    }
  }
}

template <int STEPS>
__device__ __forceinline__ int first_owned(int lane) {
  int first = 0;
#pragma unroll
  for (int bit = 1 << N_SHIFT, count = STEPS; bit < LANES_N << N_SHIFT && count > 1; bit *= 2) {
    count /= 2;
    first += (lane & bit) ? count : 0;
  }
  return first;
}

// The state that enters this segment: the given one carried through the segments before it
// (forward) or after it (backward), each of which is x -> exp(A time) x + state.
template <bool REVERSED>
__device__ __forceinline__ void enter_segment(const Params& p, const Place& w, const float* given,
                                              const float (&A)[CHANNELS][STATES],
                                              float (&x)[CHANNELS][STATES]) {
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    int channel = w.channel + c;
#pragma unroll
    for (int j = 0; j < STATES; ++j) {
      int n = w.lane_n * STATES + j;
      bool inside = channel < p.d && n < p.n && given != nullptr;
      x[c][j] = inside ? given[(static_cast<long long>(w.batch) * p.d + channel) * p.n + n] : 0.f;
    }
    if (channel >= p.d) continue;
    int count = REVERSED ? p.segments - 1 - w.segment : w.segment;
    for (int i = 0; i < count; ++i) {
      int s = REVERSED ? p.segments - 1 - i : i;
      long long row = (static_cast<long long>(w.batch) * p.segments + s) * p.d + channel;
      float time = p.segment_time[row];
      float add[STATES];
      load_states(p.segment_state + row * N_PAD, w.lane_n, add);
#pragma unroll
      for (int j = 0; j < STATES; ++j) x[c][j] = exp2_fast(A[c][j] * time) * x[c][j] + add[j];
    }
  }
}

// A log2(e), zero outside (d, n): a state that is not there stays zero.
__device__ __forceinline__ void load_A(const Params& p, const Place& w,
                                       float (&A)[CHANNELS][STATES]) {
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
    for (int j = 0; j < STATES; ++j) {
      int channel = w.channel + c, n = w.lane_n * STATES + j;
      bool inside = channel < p.d && n < p.n;
      A[c][j] = inside ? LOG2_E * p.A[static_cast<long long>(channel) * p.n + n] : 0.f;
    }
}

// Write the states of a segment's end and how much time (sum of delta) it spans.
__device__ __forceinline__ void store_segment(const Params& p, const Place& w,
                                              const float (&x)[CHANNELS][STATES],
                                              const float (&time)[CHANNELS]) {
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (w.channel + c >= p.d) continue;
    long long row =
        (static_cast<long long>(w.batch) * p.segments + w.segment) * p.d + w.channel + c;
    store_states(p.segment_state + row * N_PAD, w.lane_n, x[c]);
    if (w.lane_n == 0) p.segment_time[row] = time[c];
  }
}

// How many of a thread's two neighbouring channels exist: 0, 1 or 2 (with VECTORS never 1).
__device__ __forceinline__ int channels_at(const Params& p, int channel) {
  return min(max(p.d - channel, 0), CHANNELS);
}

template <class T>
__device__ __forceinline__ float2 read_pair(const T* at, int count) {
  if (count == 0) return make_float2(0.f, 0.f);
  if (VECTORS) return load_pair(at);
  return make_float2(to_float(at[0]), count > 1 ? to_float(at[1]) : 0.f);
}

template <class T>
__device__ __forceinline__ void write_pair(T* at, int count, float first, float second) {
  if (count == 0) return;
  if (VECTORS) {
    Pair<T> v;
    put(v.first, first);
    put(v.second, second);
    *reinterpret_cast<Pair<T>*>(at) = v;
  } else {
    put(at[0], first);
    if (count > 1) put(at[1], second);
  }
}

__device__ __forceinline__ float2 bias_at(const Params& p, int channel) {
  if (!HAS_BIAS) return make_float2(0.f, 0.f);
  int count = channels_at(p, channel);
  return make_float2(count > 0 ? p.bias[channel] : 0.f, count > 1 ? p.bias[channel + 1] : 0.f);
}

__device__ __forceinline__ float step_size(float x) { return SOFTPLUS ? softplus(x) : x; }

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
