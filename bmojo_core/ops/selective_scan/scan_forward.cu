// Walks through time that need no memory of where they have been: the outputs, what a segment adds
// to the state, and (backward in time) what it adds to the state's gradient. Tiles of TILE steps
// are copied ahead into shared memory while the tile before them is walked through; each tile is
// first turned into step sizes, drives and float B, C, once for all threads.

enum Walk {
  OUTPUTS,   // x_t = a_t x_{t-1} + B_t (delta_t u_t),  y_t = C_t x_t
  ADDED,     // the same x only, from zero to the segment's end
  GRADIENTS  // g_t = a_t (g_{t+1} + C_t dy_t), from zero to the segment's begin
};

constexpr int TILE = 32;
constexpr int RESIDENT = N_PAD == 16 ? 4 : 1;  // blocks a multiprocessor is to hold
constexpr int BC_PER_THREAD = (TILE * N_PAD + THREADS - 1) / THREADS;

struct alignas(16) ForwardShared {
  float2 step[TILE][BLOCK_C];  // (delta, drive): the drive is delta u, or dy before the gate
  float B[TILE][N_PAD], C[TILE][N_PAD];
  U_T u[2][TILE][BLOCK_C], z[2][TILE][BLOCK_C];
  DELTA_T delta[2][TILE][BLOCK_C];
};

static_assert(sizeof(ForwardShared) == SHARED_BYTES, "the host counts the same bytes");

extern __shared__ __align__(16) unsigned char shared_bytes[];

// The first `rows` rows and `columns` columns of a tile; the rest of `to` stays as it is.
template <class T>
__device__ __forceinline__ void copy_tile(T (&to)[TILE][BLOCK_C], const T* from, long long stride,
                                          int rows, int columns) {
  constexpr int WIDTH = VECTORS ? 16 / sizeof(T) : CHANNELS;
  constexpr int PER_ROW = BLOCK_C / WIDTH, STEP = THREADS / PER_ROW;
  int c = threadIdx.x % PER_ROW * WIDTH, first = threadIdx.x / PER_ROW;
#pragma unroll
  for (int k = 0; k < (TILE + STEP - 1) / STEP; ++k) {
    int t = first + k * STEP;
    if (t >= min(TILE, rows)) break;
    const T* at = from + t * stride + c;
    if (VECTORS) {
      if (c < columns) copy_async_16(&to[t][c], at);
    } else {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        if (c + i < columns) to[t][c + i] = at[i];
    }
  }
}

// Where a block's tiles come from, and its tile of B and C while it is on its way. Gradients are
// driven by dy and C where states are driven by u and B.
template <Walk WALK>
struct Source {
  static constexpr bool GATED = HAS_Z && WALK != ADDED;
  const U_T *u, *z;
  const DELTA_T* delta;
  const BC_T *B, *C;
  long long u_l, B_l;
  float B_next[BC_PER_THREAD], C_next[BC_PER_THREAD];

  __device__ __forceinline__ Source(const Params& p, const Place& w) {
    int column = w.block * BLOCK_C, n = min(static_cast<int>(threadIdx.x) % N_PAD, p.n - 1);
    delta = rows_of<DELTA_T>(p.delta, p.delta_b, w.batch, column);
    if (GATED) z = rows_of<U_T>(p.z, p.z_b, w.batch, column);
    C = rows_of<BC_T>(p.C, p.C_b, w.batch, n);
    if (WALK == GRADIENTS) {
      u = rows_of<U_T>(p.dy, p.dy_b, w.batch, column), u_l = p.dy_l;
      B = C, B_l = p.C_l;
    } else {
      u = rows_of<U_T>(p.u, p.u_b, w.batch, column), u_l = p.u_l;
      B = rows_of<BC_T>(p.B, p.B_b, w.batch, n), B_l = p.B_l;
    }
  }

  __device__ __forceinline__ void request(const Params& p, const Place& w, ForwardShared& s,
                                          int t0, int stage) {
    int rows = w.end - t0, columns = p.d - w.block * BLOCK_C;
    copy_tile(s.u[stage], u + t0 * u_l, u_l, rows, columns);
    copy_tile(s.delta[stage], delta + t0 * p.delta_l, p.delta_l, rows, columns);
    if (GATED) copy_tile(s.z[stage], z + t0 * p.z_l, p.z_l, rows, columns);
    bool inside = threadIdx.x % N_PAD < p.n;
#pragma unroll
    for (int k = 0; k < BC_PER_THREAD; ++k) {
      int t = threadIdx.x / N_PAD + k * (THREADS / N_PAD);
      bool here = inside && t < rows;
      B_next[k] = here ? to_float(B[(t0 + t) * B_l]) : 0.f;
      if (WALK == OUTPUTS) C_next[k] = here ? to_float(C[(t0 + t) * p.C_l]) : 0.f;
    }
  }

  // Steps, drives and B, C of the tile that has arrived, once for all threads.
  __device__ __forceinline__ void prepare(ForwardShared& s, int stage, int rows, float2 bias) {
    int c = threadIdx.x % PAIRS * CHANNELS, first = threadIdx.x / PAIRS;
#pragma unroll
    for (int k = 0; k < TILE / LANES_N; ++k) {
      int t = first + k * LANES_N;
      float2 raw = load_pair(&s.delta[stage][t][c]), u = load_pair(&s.u[stage][t][c]);
      float d0 = step_size(raw.x + bias.x), d1 = step_size(raw.y + bias.y);
      float4 step = make_float4(d0, d0 * u.x, d1, d1 * u.y);
      if (WALK == GRADIENTS) {
        step.y = u.x, step.w = u.y;
        if (GATED) {
          float2 z = load_pair(&s.z[stage][t][c]);
          step.y *= silu(z.x);
          step.w *= silu(z.y);
        }
      }
      if (t >= rows) step = make_float4(0.f, 0.f, 0.f, 0.f);
      *reinterpret_cast<float4*>(&s.step[t][c]) = step;
    }
#pragma unroll
    for (int k = 0; k < BC_PER_THREAD; ++k) {
      int i = k * THREADS + threadIdx.x;
      if (i >= TILE * N_PAD) break;
      (&s.B[0][0])[i] = B_next[k];
      if (WALK == OUTPUTS) (&s.C[0][0])[i] = C_next[k];
    }
  }
};

// GROUP steps: the states move on, y becomes each thread's share of C_t x_t.
template <Walk WALK>
__device__ __forceinline__ void walk_group(const Place& w, const ForwardShared& s, int first,
                                           const float (&A)[CHANNELS][STATES],
                                           float (&x)[CHANNELS][STATES],
                                           float (&time)[CHANNELS],
                                           float (&y)[CHANNELS][GROUP]) {
#pragma unroll
  for (int i = 0; i < GROUP; ++i) {
    int t = WALK == GRADIENTS ? GROUP - 1 - i : i;
    float4 step = *reinterpret_cast<const float4*>(&s.step[first + t][w.local_c]);
    float B[STATES], C[STATES];
    load_states(s.B[first + t], w.lane_n, B);
    if (WALK == OUTPUTS) load_states(s.C[first + t], w.lane_n, C);
    const float delta[CHANNELS] = {step.x, step.z}, drive[CHANNELS] = {step.y, step.w};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      if (WALK == OUTPUTS) y[c][t] = 0.f;
      if (WALK != OUTPUTS) time[c] += delta[c];
#pragma unroll
      for (int j = 0; j < STATES; ++j) {
        float decay = exp2_fast(delta[c] * A[c][j]);
        if (WALK == GRADIENTS)
          x[c][j] = decay * (x[c][j] + drive[c] * B[j]);
        else
          x[c][j] = decay * x[c][j] + drive[c] * B[j];
        if (WALK == OUTPUTS) y[c][t] += C[j] * x[c][j];
      }
    }
  }
}

template <Walk WALK>
__device__ __forceinline__ void walk_segment(const Params& p) {
  ForwardShared& s = *reinterpret_cast<ForwardShared*>(shared_bytes);
  Place w = locate(p);
  if (WALK == GRADIENTS && w.segment == 0) return;  // nothing lies before it
  float A[CHANNELS][STATES], x[CHANNELS][STATES] = {}, time[CHANNELS] = {}, D[CHANNELS] = {};
  load_A(p, w, A);
  if (WALK == OUTPUTS) {
    enter_segment<false>(p, w, p.initial, A, x);
    for (int c = 0; c < CHANNELS; ++c)
      if (p.D && w.channel + c < p.d) D[c] = p.D[w.channel + c];
  }
  // lanes beyond the first GROUP of a channel only repeat what those hold: they write nothing
  int count = w.lane_n < GROUP ? channels_at(p, w.channel) : 0, mine = first_owned<GROUP>(w.lane);
  float2 bias = bias_at(p, w.block * BLOCK_C + threadIdx.x % PAIRS * CHANNELS);
  U_T* y_rows = static_cast<U_T*>(p.y) + static_cast<long long>(w.batch) * p.l * p.d + w.channel;
  int tiles = (w.end - w.begin + TILE - 1) / TILE, ahead = WALK == GRADIENTS ? -TILE : TILE;
  int t0 = WALK == GRADIENTS ? w.begin + (tiles - 1) * TILE : w.begin;
  Source<WALK> source(p, w);
  source.request(p, w, s, t0, 0);
  for (int k = 0, stage = 0; k < tiles; ++k, stage ^= 1, t0 += ahead) {
    int rows = w.end - t0;
    copy_async_wait();
    __syncthreads();
    source.prepare(s, stage, rows, bias);
    __syncthreads();
    if (k + 1 < tiles) source.request(p, w, s, t0 + ahead, stage ^ 1);

    if (WALK == OUTPUTS && p.checkpoints && t0 % CHUNK == 0) {
      long long row = (static_cast<long long>(w.batch) * p.chunks + t0 / CHUNK) * p.d + w.channel;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        if (w.channel + c < p.d)
          store_states(static_cast<Part*>(p.checkpoints) + (row + c) * N_PAD, w.lane_n, x[c]);
    }

    for (int i = 0; i < TILE; i += GROUP) {
      int g = WALK == GRADIENTS ? TILE - GROUP - i : i;
      float y[CHANNELS][GROUP];
      walk_group<WALK>(w, s, g, A, x, time, y);
      if (WALK != OUTPUTS) continue;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) sum_over_states(y[c], w.lane);
#pragma unroll
      for (int o = 0; o < OWNED; ++o) {
        int t = g + mine + o;
        if (t >= rows) continue;
        float2 u = load_pair(&s.u[stage][t][w.local_c]);
        float y0 = y[0][o] + D[0] * u.x, y1 = y[1][o] + D[1] * u.y;
        if (HAS_Z) {
          float2 z = load_pair(&s.z[stage][t][w.local_c]);
          y0 *= silu(z.x);
          y1 *= silu(z.y);
        }
        write_pair(y_rows + static_cast<long long>(t0 + t) * p.d, count, y0, y1);
      }
    }
  }

  if (WALK != OUTPUTS) {
    store_segment(p, w, x, time);
  } else if (p.last && w.segment == p.segments - 1) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int j = 0; j < STATES; ++j) {
        int channel = w.channel + c, n = w.lane_n * STATES + j;
        if (channel < p.d && n < p.n)
          p.last[(static_cast<long long>(w.batch) * p.d + channel) * p.n + n] = x[c][j];
      }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_outputs(const Params p) {
  walk_segment<OUTPUTS>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
scan_segment_states(const Params p) {
  walk_segment<ADDED>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
scan_segment_gradients(const Params p) {
  walk_segment<GRADIENTS>(p);
}
