// Backward, with g_t = dL/dx_t :
//
//   g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}
//   dC_t = sum_c dy_t x_t        dB_t = sum_c delta_t u_t g_t       d(delta u)_t = sum_n g_t B_t
//   dA = sum_t delta_t q_t       ddelta_t = u_t d(delta u)_t + sum_n A q_t,
//   where q_t = g_t exp(delta_t A) x_{t-1}
//
// A chunk's states are rebuilt from its checkpoint in two levels: one walk through the chunk
// leaves the state before each group of BACK steps in shared memory, then each group, last
// first, is rebuilt in registers and walked backward. Groups are short so that their states leave
// registers for three blocks a multiprocessor; two of them hand their dB and dC out together.

constexpr int BACK = 4;                     // steps that are rebuilt at once
constexpr int RESIDENT = N_PAD == 16 ? 3 : 1;  // blocks a multiprocessor is to hold, at least
constexpr int GROUPS = CHUNK / BACK, PER_OCTET = OCTET / BACK;
constexpr int BACK_OWNED = LANES_N >= BACK ? 1 : BACK / LANES_N;
constexpr int KINDS = 2 * STATES;  // a thread's dB and dC of one step
constexpr bool MATRIX = HALF && (LANES_N == 8 || (LANES_N == 4 && STATES == 4));

struct alignas(16) BackwardShared {
  float2 step[CHUNK][BLOCK_C];  // (delta, delta u)
  float dy[CHUNK][BLOCK_C];     // gradient of y before the gate
  float B[CHUNK][N_PAD], C[CHUNK][N_PAD];
  float start[GROUPS - 1][CHANNELS][THREADS][STATES];
  float dbc[2][WARPS][OCTET][2 * N_PAD];
};

static_assert(sizeof(BackwardShared) == SHARED_BYTES, "the host counts the same bytes");

extern __shared__ __align__(16) unsigned char shared_bytes[];

// The i-th lane bit that counts channels; there are 5 - N_BITS.
constexpr int N_BITS = LANES_N == 1 ? 0 : LANES_N == 2 ? 1 : LANES_N == 4 ? 2 : LANES_N == 8 ? 3
                     : LANES_N == 16 ? 4 : 5;
__device__ constexpr int channel_bit(int i) { return 1 << (i < N_SHIFT ? i : i + N_BITS); }

// Sum v over the lanes of the same states. Lane by lane the carried part halves while it can.
__device__ __forceinline__ void sum_over_channels(float (&v)[KINDS], int lane) {
#pragma unroll
  for (int i = 0, count = KINDS; i < 5 - N_BITS; ++i) {
    const int bit = channel_bit(i);
    if (count > 1) {
      count /= 2;
      bool upper = lane & bit;
#pragma unroll
      for (int k = 0; k < KINDS / 2; ++k) {
        if (k < count) {
          float give = upper ? v[k] : v[k + count];
          float keep = upper ? v[k + count] : v[k];
          v[k] = keep + __shfl_xor_sync(0xffffffffu, give, bit);
        }
      }
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], bit);
    }
  }
}

// Which of the KINDS sums the lane was left with, and how many (KINDS_OWNED).
constexpr int KINDS_OWNED = LANES_C >= KINDS ? 1 : KINDS / LANES_C;
__device__ __forceinline__ int first_kind(int lane) {
  int first = 0;
#pragma unroll
  for (int i = 0, count = KINDS; i < 5 - N_BITS && count > 1; ++i) {
    count /= 2;
    first += (lane & channel_bit(i)) ? count : 0;
  }
  return first;
}

// The same sums on the matrix units, for all OCTET steps at once. Products of step t go into row t
// of D (two kinds a product: one in rows 0..7, one in rows 8..15), their sum over the four lanes
// that share lane / 4 is the matrix product's own.
struct MatrixSums {
  float d[STATES][4] = {};

  __device__ __forceinline__ void add(const float (&v)[KINDS], int t, int lane) {
    float row = (lane >> 2) == t ? 1.f : 0.f;
#pragma unroll
    for (int k = 0; k < STATES; ++k) multiply_accumulate(d[k], row, row, v[2 * k], v[2 * k + 1]);
  }

  // Lane i has row (step) i / 4, columns 2 (i % 4) + e: state lanes, and above them (LANES_N == 4)
  // one more bit of channels, whose two halves meet by one exchange.
  __device__ __forceinline__ void write(float (*dbc)[2 * N_PAD], int lane) {
    int t = lane >> 2, q = lane & 3;
    if constexpr (LANES_N == 4) {
      bool upper = q & 2;  // keeps dC, gives dB
      float sum[STATES / 2][4];
#pragma unroll
      for (int k = 0; k < STATES / 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float give = upper ? d[k][i] : d[k + STATES / 2][i];
          float keep = upper ? d[k + STATES / 2][i] : d[k][i];
          sum[k][i] = keep + __shfl_xor_sync(0xffffffffu, give, 2);
        }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v[STATES];
#pragma unroll
        for (int i = 0; i < STATES; ++i) v[i] = sum[i / 2][i % 2 * 2 + e];
        store_states(dbc[t] + (upper ? N_PAD : 0), 2 * (q & 1) + e, v);
      }
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v[2][STATES];
#pragma unroll
        for (int i = 0; i < KINDS; ++i) v[i / STATES][i % STATES] = d[i / 2][i % 2 * 2 + e];
        store_states(dbc[t], 2 * q + e, v[0]);
        store_states(dbc[t] + N_PAD, 2 * q + e, v[1]);
      }
    }
  }
};

// A chunk's rows of a (b, l, width) tensor. The first is the same for a whole block, so that what
// differs from thread to thread, an offset inside the chunk, is counted in 32 bits.
template <class T>
struct Rows {
  char* first;
  unsigned stride;

  __device__ __forceinline__ Rows(const void* base, int batch, long long b_stride, int t0,
                                  long long l_stride)
      : first(static_cast<char*>(const_cast<void*>(base)) +
              (batch * b_stride + t0 * l_stride) * static_cast<long long>(sizeof(T))),
        stride(static_cast<unsigned>(l_stride)) {}

  __device__ __forceinline__ T* at(int t, int column) const {
    return reinterpret_cast<T*>(first + (t * stride + column) * static_cast<unsigned>(sizeof(T)));
  }

  // A row of the chunk before this one is to be near when its turn comes.
  __device__ __forceinline__ void prefetch_before(int t, int column, int columns) const {
    const char* row = first - (CHUNK - t) * (static_cast<long long>(stride) * sizeof(T));
#pragma unroll
    for (int i = 0; i < BLOCK_C; i += 128 / sizeof(T))
      if (i < columns) prefetch(row + (column + i) * sizeof(T));
  }
};

struct Chunk {  // what the walk back through one chunk reads, and what it writes
  Rows<U_T> u, z, dy, du, dz;
  Rows<DELTA_T> delta, ddelta;
  Rows<BC_T> B, C;
  int t0, rows;

  __device__ __forceinline__ Chunk(const Params& p, const Place& w, int t0)
      : u(p.u, w.batch, p.u_b, t0, p.u_l),
        z(p.z, w.batch, p.z_b, t0, p.z_l),
        dy(p.dy, w.batch, p.dy_b, t0, p.dy_l),
        du(p.du, w.batch, static_cast<long long>(p.l) * p.d, t0, p.d),
        dz(p.dz, w.batch, static_cast<long long>(p.l) * p.d, t0, p.d),
        delta(p.delta, w.batch, p.delta_b, t0, p.delta_l),
        ddelta(p.ddelta, w.batch, static_cast<long long>(p.l) * p.d, t0, p.d),
        B(p.B, w.batch, p.B_b, t0, p.B_l),
        C(p.C, w.batch, p.C_b, t0, p.C_l),
        t0(t0),
        rows(w.end - t0) {}
};

// Everything the walk needs of a chunk, prepared once for all threads.
__device__ __forceinline__ void prepare_chunk(const Params& p, const Place& w, BackwardShared& s,
                                              const Chunk& chunk, float2 bias) {
  int c = threadIdx.x % PAIRS * CHANNELS, first = threadIdx.x / PAIRS;
  int channel = w.block * BLOCK_C + c, there = channels_at(p, channel);
  constexpr int BC_STEP = THREADS / N_PAD, BC_COUNT = (CHUNK + BC_STEP - 1) / BC_STEP;
  constexpr int EARLY = BC_COUNT < 4 ? BC_COUNT : 4;  // rows of B and C on their way meanwhile
  unsigned B[EARLY], C[EARLY];
  const int n = threadIdx.x % N_PAD, row = threadIdx.x / N_PAD;
#pragma unroll
  for (int k = 0; k < EARLY; ++k) {
    int t = row + k * BC_STEP;
    bool inside = n < p.n && t < chunk.rows;
    B[k] = inside ? bits_of(*chunk.B.at(t, n)) : 0u;
    C[k] = inside ? bits_of(*chunk.C.at(t, n)) : 0u;
  }
#pragma unroll 4
  for (int t = first; t < CHUNK; t += LANES_N) {
    int count = t < chunk.rows ? there : 0;
    float2 raw = read_pair(chunk.delta.at(t, channel), count);
    float2 u = read_pair(chunk.u.at(t, channel), count);
    float2 dy = read_pair(chunk.dy.at(t, channel), count);
    if (HAS_Z) {
      float2 z = read_pair(chunk.z.at(t, channel), count);
      dy.x *= silu(z.x);
      dy.y *= silu(z.y);
    }
    float d0 = count > 0 ? step_size(raw.x + bias.x) : 0.f;
    float d1 = count > 1 ? step_size(raw.y + bias.y) : 0.f;
    *reinterpret_cast<float4*>(&s.step[t][c]) = make_float4(d0, d0 * u.x, d1, d1 * u.y);
    *reinterpret_cast<float2*>(&s.dy[t][c]) = dy;
  }
#pragma unroll
  for (int k = 0; k < EARLY; ++k) {
    s.B[row + k * BC_STEP][n] = from_bits<BC_T>(B[k]);
    s.C[row + k * BC_STEP][n] = from_bits<BC_T>(C[k]);
  }
#pragma unroll 4
  for (int t = row + EARLY * BC_STEP; t < CHUNK; t += BC_STEP) {
    bool inside = n < p.n && t < chunk.rows;
    s.B[t][n] = inside ? to_float(*chunk.B.at(t, n)) : 0.f;
    s.C[t][n] = inside ? to_float(*chunk.C.at(t, n)) : 0.f;
  }
}

// What prepare_chunk will read next, a row a thread: it reads it when there is nothing else to do.
__device__ __forceinline__ void prefetch_before(const Params& p, const Place& w,
                                                const Chunk& chunk) {
  int column = w.block * BLOCK_C, columns = p.d - column, t = w.lane;
#pragma unroll
  for (int i = 0; i < 4; i += WARPS) {
    int which = w.warp + i;
    if (which == 0) chunk.u.prefetch_before(t, column, columns);
    if (which == 1) chunk.delta.prefetch_before(t, column, columns);
    if (which == 2) chunk.dy.prefetch_before(t, column, columns);
    if (which == 3 && HAS_Z) chunk.z.prefetch_before(t, column, columns);
  }
  long long first = (static_cast<long long>(w.batch) * p.chunks + chunk.t0 / CHUNK - 1) * p.d;
  const Part* states = static_cast<const Part*>(p.checkpoints) + (first + column) * N_PAD;
  constexpr int LINE = 128 / sizeof(Part);
  for (int i = threadIdx.x * LINE; i < min(columns, BLOCK_C) * N_PAD; i += THREADS * LINE)
    prefetch(states + i);
}

struct Sums {  // over this thread's time steps
  float A[CHANNELS][STATES], D[CHANNELS], bias[CHANNELS];
};

// What a lane reads early and uses last: inputs of the steps it owns.
struct Owned {
  float2 u[BACK_OWNED], z[BACK_OWNED], dout[BACK_OWNED];

  __device__ __forceinline__ Owned(const Place& w, const Chunk& chunk, int group, int there) {
#pragma unroll
    for (int i = 0; i < BACK_OWNED; ++i) {
      int t = group * BACK + first_owned<BACK>(w.lane) + i;
      int count = t < chunk.rows ? there : 0;
      u[i] = read_pair(chunk.u.at(t, w.channel), count);
      if (HAS_Z) z[i] = read_pair(chunk.z.at(t, w.channel), count);
      if (HAS_Z) dout[i] = read_pair(chunk.dy.at(t, w.channel), count);
    }
  }
};

// Gradients of u, delta and z for the steps and the two channels whose sums this lane owns.
__device__ __forceinline__ void finish_steps(const Place& w, const BackwardShared& s,
                                             const Chunk& chunk, const Owned& own, int group,
                                             int there,
                                             const float (&D)[CHANNELS],
                                             const float (&y)[CHANNELS][BACK],
                                             const float (&dstep)[CHANNELS][BACK],
                                             const float (&dtime)[CHANNELS][BACK], Sums& sums) {
#pragma unroll
  for (int i = 0; i < BACK_OWNED; ++i) {
    int t = group * BACK + first_owned<BACK>(w.lane) + i;
    if (t >= chunk.rows) continue;
    // lanes beyond the first BACK of a channel only repeat what those hold: they write nothing
    int count = w.lane_n < BACK ? there : 0;
    float4 step = *reinterpret_cast<const float4*>(&s.step[t][w.local_c]);
    float2 dy2 = *reinterpret_cast<const float2*>(&s.dy[t][w.local_c]);
    const float delta[CHANNELS] = {step.x, step.z}, dy[CHANNELS] = {dy2.x, dy2.y};
    const float u[CHANNELS] = {own.u[i].x, own.u[i].y};
    float du[CHANNELS], ddelta[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      du[c] = delta[c] * dstep[c][i] + D[c] * dy[c];
      ddelta[c] = u[c] * dstep[c][i] + LN_2 * dtime[c][i];
      if (SOFTPLUS) ddelta[c] *= softplus_slope(delta[c]);
      sums.D[c] += dy[c] * u[c];
      sums.bias[c] += ddelta[c];
    }
    write_pair(chunk.du.at(t, w.channel), count, du[0], du[1]);
    write_pair(chunk.ddelta.at(t, w.channel), count, ddelta[0], ddelta[1]);
    if (!HAS_Z) continue;
    const float z[CHANNELS] = {own.z[i].x, own.z[i].y};
    const float dout[CHANNELS] = {own.dout[i].x, own.dout[i].y};
    float dz[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      float gate = sigmoid(z[c]);
      dz[c] = dout[c] * (y[c][i] + D[c] * u[c]) * gate * (1.f + z[c] * (1.f - gate));
    }
    write_pair(chunk.dz.at(t, w.channel), count, dz[0], dz[1]);
  }
}

// One group of steps: rebuild its states, walk backward, hand out the sums.
__device__ __forceinline__ void group_backward(const Place& w, BackwardShared& s,
                                               const Chunk& chunk, int group, int there, const float (&A)[CHANNELS][STATES],
                                               const float (&D)[CHANNELS],
                                               const float (&start)[CHANNELS][STATES],
                                               float (&g)[CHANNELS][STATES], Sums& sums,
                                               MatrixSums& matrix) {
  Owned own(w, chunk, group, there);
  float x[BACK][CHANNELS][STATES], a[BACK][CHANNELS][STATES];
  float y[CHANNELS][BACK], dstep[CHANNELS][BACK], dtime[CHANNELS][BACK];
#pragma unroll
  for (int t = 0; t < BACK; ++t) {
    int row = group * BACK + t;
    float4 step = *reinterpret_cast<const float4*>(&s.step[row][w.local_c]);
    float B[STATES], C[STATES];
    load_states(s.B[row], w.lane_n, B);
    load_states(s.C[row], w.lane_n, C);
    const float delta[CHANNELS] = {step.x, step.z}, du[CHANNELS] = {step.y, step.w};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      y[c][t] = 0.f;
#pragma unroll
      for (int j = 0; j < STATES; ++j) {
        a[t][c][j] = exp2_fast(delta[c] * A[c][j]);
        x[t][c][j] = a[t][c][j] * (t ? x[t - 1][c][j] : start[c][j]) + du[c] * B[j];
        y[c][t] += C[j] * x[t][c][j];
      }
    }
  }
  if (HAS_Z) {
    sum_over_states(y[0], w.lane);
    sum_over_states(y[1], w.lane);
  }
  const int octet = group / PER_OCTET, first = group % PER_OCTET * BACK;
  float(*dbc)[2 * N_PAD] = s.dbc[octet & 1][w.warp] + first;
#pragma unroll
  for (int t = BACK - 1; t >= 0; --t) {
    int row = group * BACK + t;
    float4 step = *reinterpret_cast<const float4*>(&s.step[row][w.local_c]);
    float2 dy2 = *reinterpret_cast<const float2*>(&s.dy[row][w.local_c]);
    float B[STATES], C[STATES];
    load_states(s.B[row], w.lane_n, B);
    load_states(s.C[row], w.lane_n, C);
    const float delta[CHANNELS] = {step.x, step.z}, du[CHANNELS] = {step.y, step.w};
    const float dy[CHANNELS] = {dy2.x, dy2.y};
    float v[KINDS] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      dstep[c][t] = dtime[c][t] = 0.f;
#pragma unroll
      for (int j = 0; j < STATES; ++j) {
        g[c][j] += C[j] * dy[c];
        v[j] += du[c] * g[c][j];
        v[STATES + j] += dy[c] * x[t][c][j];
        dstep[c][t] += B[j] * g[c][j];
        g[c][j] *= a[t][c][j];
        float q = g[c][j] * (t ? x[t - 1][c][j] : start[c][j]);
        dtime[c][t] += A[c][j] * q;
        sums.A[c][j] += delta[c] * q;
      }
    }
    if (MATRIX) {
      matrix.add(v, first + t, w.lane);
      continue;
    }
    sum_over_channels(v, w.lane);
    if (w.lane_c < KINDS) {
#pragma unroll
      for (int i = 0; i < KINDS_OWNED; ++i) {
        int kind = first_kind(w.lane) + i;
        dbc[t][(kind / STATES) * N_PAD + w.lane_n * STATES + kind % STATES] = v[i];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    sum_over_states(dstep[c], w.lane);
    sum_over_states(dtime[c], w.lane);
  }
  finish_steps(w, s, chunk, own, group, there, D, y, dstep, dtime, sums);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_gradients(const Params p) {
  BackwardShared& s = *reinterpret_cast<BackwardShared*>(shared_bytes);
  Place w = locate(p);
  float A[CHANNELS][STATES], g[CHANNELS][STATES], D[CHANNELS] = {};
  Sums sums = {};
  load_A(p, w, A);
  enter_segment<true>(p, w, p.dlast, A, g);
  for (int c = 0; c < CHANNELS; ++c)
    if (p.D && w.channel + c < p.d) D[c] = p.D[w.channel + c];
  float2 bias = bias_at(p, w.block * BLOCK_C + threadIdx.x % PAIRS * CHANNELS);
  int there = channels_at(p, w.channel);

  for (int t0 = w.begin + (w.end - 1 - w.begin) / CHUNK * CHUNK; t0 >= w.begin; t0 -= CHUNK) {
    Chunk chunk(p, w, t0);
    prepare_chunk(p, w, s, chunk, bias);
    float x[CHANNELS][STATES] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      long long row = (static_cast<long long>(w.batch) * p.chunks + t0 / CHUNK) * p.d +
                      w.channel + c;
      if (w.channel + c >= p.d) continue;
      load_states(static_cast<const Part*>(p.checkpoints) + row * N_PAD, w.lane_n, x[c]);
    }
    if (t0 > w.begin) prefetch_before(p, w, chunk);
    __syncthreads();
    for (int group = 0; group < GROUPS - 1; ++group) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        store_states(s.start[group][c][0], threadIdx.x, x[c]);
#pragma unroll
      for (int t = 0; t < BACK; ++t) {
        int row = group * BACK + t;
        float4 step = *reinterpret_cast<const float4*>(&s.step[row][w.local_c]);
        float B[STATES];
        load_states(s.B[row], w.lane_n, B);
        const float delta[CHANNELS] = {step.x, step.z}, du[CHANNELS] = {step.y, step.w};
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
          for (int j = 0; j < STATES; ++j)
            x[c][j] = exp2_fast(delta[c] * A[c][j]) * x[c][j] + du[c] * B[j];
      }
    }
    for (int octet = CHUNK / OCTET - 1; octet >= 0; --octet) {
      MatrixSums matrix;
      for (int group = (octet + 1) * PER_OCTET - 1; group >= octet * PER_OCTET; --group) {
        if (group < GROUPS - 1) {
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) load_states(s.start[group][c][0], threadIdx.x, x[c]);
        }
        group_backward(w, s, chunk, group, there, A, D, x, g, sums, matrix);
      }
      if constexpr (MATRIX) matrix.write(s.dbc[octet & 1][w.warp], w.lane);
      __syncthreads();
      long long row = (static_cast<long long>(w.block) * p.b + w.batch) * p.l + t0 + octet * OCTET;
      Part* to = static_cast<Part*>(p.dbc) + row * (2 * N_PAD);
#pragma unroll 1
      for (int i = 2 * threadIdx.x; i < OCTET * 2 * N_PAD; i += 2 * THREADS) {
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int k = 0; k < WARPS; ++k) {
          float2 v = *reinterpret_cast<const float2*>(&s.dbc[octet & 1][k][0][0] + i);
          sum.x += v.x, sum.y += v.y;
        }
        Pair<Part> v;
        put(v.first, sum.x);
        put(v.second, sum.y);
        if (t0 + octet * OCTET + i / (2 * N_PAD) < w.end) *reinterpret_cast<Pair<Part>*>(to + i) = v;
      }
    }
  }

#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (LANES_N > BACK && w.lane_n >= BACK) sums.D[c] = sums.bias[c] = 0.f;
#pragma unroll
    for (int bit = 1 << N_SHIFT; bit < LANES_N << N_SHIFT; bit *= 2) {
      sums.D[c] += __shfl_xor_sync(0xffffffffu, sums.D[c], bit);
      sums.bias[c] += __shfl_xor_sync(0xffffffffu, sums.bias[c], bit);
    }
    int channel = w.channel + c;
    if (channel >= p.d) continue;
    float* row = p.dparams +
        ((static_cast<long long>(w.batch) * p.segments + w.segment) * p.d + channel) * (N_PAD + 2);
#pragma unroll
    for (int j = 0; j < STATES; ++j) {
      int n = w.lane_n * STATES + j;
      row[n] = sums.A[c][j];
      if (p.dinitial && w.segment == 0 && n < p.n)
        p.dinitial[(static_cast<long long>(w.batch) * p.d + channel) * p.n + n] = g[c][j];
    }
    if (w.lane_n == 0) row[N_PAD] = sums.D[c], row[N_PAD + 1] = sums.bias[c];
  }
}

// dB and dC: the sum over the blocks of channels, always in the same order.
extern "C" __global__ void scan_sum_over_channels(const Params p) {
  int blocks = (p.d + BLOCK_C - 1) / BLOCK_C;
  long long size = static_cast<long long>(p.b) * p.l * 2 * N_PAD;
  long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += stride) {
    float sum = 0.f;
#pragma unroll 8
    for (int k = 0; k < blocks; ++k) sum += to_float(static_cast<const Part*>(p.dbc)[k * size + i]);
    int n = i % N_PAD;
    BC_T* to = static_cast<BC_T*>((i / N_PAD) % 2 ? p.dC : p.dB);
    if (n < p.n) put(to[i / (2 * N_PAD) * p.n + n], sum);
  }
}
