// Innovation of the fading memory and the running selection of its largest values.
//
//   e_t = mean_d (y_t - sum_{j=1..TAPS} w_j y_{t-j})^2
//   M_i = the k positions t < i chunk with the largest e_t, equal ones resolved for the older
//
// Defined by the host: Y_T (type of y), TAPS, VECTOR (channels a thread moves at once).

struct Params {
  const void *y, *past;          // (b, l, d); (b, TAPS, d)
  const float *weights, *scores;  // (TAPS,); (b, l)
  float* error;                   // (b, l)
  long long* index;               // (b, c, k)
  unsigned char* valid;           // (b, c, k)
  long long y_b, y_l;
  int b, l, d, k, chunk, chunks;
};

constexpr int TILE = 16;  // steps a block takes: one for each lane of half a warp at the end
constexpr int ERROR_THREADS = 128;
constexpr int SELECT_THREADS = 512;
constexpr int SELECT_WARPS = SELECT_THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

template <int BYTES> struct Word { Y_T element; };
template <> struct Word<16> { uint4 word; };
using Raw = Word<VECTOR * sizeof(Y_T)>;

// y_t, or what was before the sequence.
__device__ __forceinline__ Raw load(const Params& p, int batch, int t, int channel) {
  const Y_T* from = nullptr;
  if (t >= 0 && t < p.l) from = static_cast<const Y_T*>(p.y) + batch * p.y_b + t * p.y_l;
  if (t < 0 && p.past)
    from = static_cast<const Y_T*>(p.past) +
           (static_cast<long long>(batch) * TAPS + t + TAPS) * p.d;
  return from ? *reinterpret_cast<const Raw*>(from + channel) : Raw{};
}

extern "C" __global__ void __launch_bounds__(ERROR_THREADS, 3) squared_error(const Params p) {
  int tiles = (p.l + TILE - 1) / TILE;
  int batch = blockIdx.x / tiles, t0 = blockIdx.x % tiles * TILE;
  float w[TAPS], error[TILE] = {};
#pragma unroll
  for (int j = 0; j < TAPS; ++j) w[j] = p.weights[j];
  for (int c = threadIdx.x * VECTOR; c < p.d; c += ERROR_THREADS * VECTOR) {
    float before[TAPS][VECTOR];  // before[j]: y_{t-1-j}
#pragma unroll
    for (int j = 0; j < TAPS; ++j) {
      Raw raw = load(p, batch, t0 - 1 - j, c);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v)
        before[j][v] = to_float(reinterpret_cast<const Y_T*>(&raw)[v]);
    }
#pragma unroll
    for (int t = 0; t < TILE; ++t) {
      Raw raw = load(p, batch, t0 + t, c);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        float y = to_float(reinterpret_cast<const Y_T*>(&raw)[v]), e = y;
#pragma unroll
        for (int j = 0; j < TAPS; ++j) e -= w[j] * before[j][v];
        error[t] += e * e;
#pragma unroll
        for (int j = TAPS - 1; j > 0; --j) before[j][v] = before[j - 1][v];
        before[0][v] = y;
      }
    }
  }
  // lane i ends with the warp's sum of step i: each exchange halves what a lane still carries
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int round = 1; round <= 4; ++round) {
    const int half = TILE >> round;
    bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < TILE / 2; ++i) {
      if (i >= half) break;
      float give = upper ? error[i] : error[i + half];
      float keep = upper ? error[i + half] : error[i];
      error[i] = keep + __shfl_xor_sync(ALL, give, half);
    }
  }
  error[0] += __shfl_xor_sync(ALL, error[0], TILE);
  __shared__ float sums[ERROR_THREADS / 32][TILE];
  if (lane < TILE) sums[warp][lane] = error[0];
  __syncthreads();
  if (warp == 0 && lane < TILE && t0 + lane < p.l) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < ERROR_THREADS / 32; ++i) sum += sums[i][lane];
    p.error[static_cast<long long>(batch) * p.l + t0 + lane] = sum / p.d;
  }
}

// Larger float, larger key; 0 for what is never stored (-inf and NaN).
__device__ __forceinline__ unsigned key_of(float score) {
  if (!(score > __uint_as_float(0xff800000u))) return 0u;
  unsigned bits = __float_as_uint(score + 0.f);  // -0 counts as 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The digit at which the counts, summed from the largest digit down, reach the rank; digit 0 if
// they never do. One warp; lane i sums eight digits, the lanes before it hold the larger ones.
__device__ __forceinline__ void find_digit(const int* count, unsigned prefix, int rank, int shift,
                                           unsigned& found_prefix, int& found_rank) {
  int lane = threadIdx.x, largest = 255 - 8 * lane, total = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) total += count[largest - j];
  int reached = total;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    int before = __shfl_up_sync(ALL, reached, step);
    if (lane >= step) reached += before;
  }
  int passed = reached - total;
  if (passed >= rank || (reached < rank && lane < 31)) return;
  int digit = largest;
  for (; digit > largest - 7 && passed + count[digit] < rank; --digit) passed += count[digit];
  found_prefix = prefix | static_cast<unsigned>(digit) << shift;
  found_rank = rank - passed;
}

// One block a chunk: find the k-th largest key of the prefix, eight bits at a time, then write the
// positions of everything above it and of the oldest equals, in order.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS) select_largest(const Params p) {
  __shared__ int count[256];
  __shared__ int above[SELECT_WARPS], equal[SELECT_WARPS];
  __shared__ unsigned found_prefix;
  __shared__ int found_rank;
  int batch = blockIdx.x / p.chunks, i = blockIdx.x % p.chunks;
  int length = min(p.l, i * p.chunk);
  const float* scores = p.scores + static_cast<long long>(batch) * p.l;
  long long row = static_cast<long long>(blockIdx.x) * p.k;

  unsigned prefix = 0;  // the leading bits of the k-th largest key
  int rank = p.k;       // its rank among the keys that share them
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int digit = threadIdx.x; digit < 256; digit += SELECT_THREADS) count[digit] = 0;
    __syncthreads();
    unsigned mask = shift == 24 ? 0u : ALL << (shift + 8);
#pragma unroll 4
    for (int t = threadIdx.x; t < length; t += SELECT_THREADS) {
      unsigned key = key_of(scores[t]);
      if (key != 0u && (key & mask) == prefix) atomicAdd(&count[key >> shift & 255u], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) find_digit(count, prefix, rank, shift, found_prefix, found_rank);
    __syncthreads();
    prefix = found_prefix;
    rank = found_rank;
  }
  // fewer than k keys in all: the search ran down to prefix 0 and everything stored lies above it

  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, written = 0, equals = 0;
  for (int t0 = 0; t0 < length; t0 += SELECT_THREADS) {
    int t = t0 + threadIdx.x;
    unsigned key = t < length ? key_of(scores[t]) : 0u;
    bool is_above = key > prefix, is_equal = key == prefix && key != 0u;
    unsigned above_bits = __ballot_sync(ALL, is_above), equal_bits = __ballot_sync(ALL, is_equal);
    unsigned before = (1u << lane) - 1u;
    if (lane == 0) above[warp] = __popc(above_bits), equal[warp] = __popc(equal_bits);
    __syncthreads();
    int my_above = __popc(above_bits & before), my_equal = equals + __popc(equal_bits & before);
    int all_above = 0, all_equal = 0;
    for (int k = 0; k < SELECT_WARPS; ++k) {
      if (k < warp) my_above += above[k], my_equal += equal[k];
      all_above += above[k], all_equal += equal[k];
    }
    // of the equals the first `rank` are kept: those before me that are kept stand before me
    int slot = written + my_above + min(my_equal, rank) - min(equals, rank);
    if (is_above || (is_equal && my_equal < rank)) {
      p.index[row + slot] = t;
      p.valid[row + slot] = 1;
    }
    written += all_above + min(equals + all_equal, rank) - min(equals, rank);
    equals += all_equal;
    __syncthreads();
  }
  for (int slot = written + threadIdx.x; slot < p.k; slot += SELECT_THREADS) {
    p.index[row + slot] = 0;
    p.valid[row + slot] = 0;
  }
}
