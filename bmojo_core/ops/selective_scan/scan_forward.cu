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
constexpr int PAD = 16 / sizeof(U_T);  // the lanes of a channel read its rows from different banks
constexpr int BC_PER_THREAD = (TILE * N_PAD + THREADS - 1) / THREADS;

struct alignas(16) ForwardShared {
  float2 step[TILE][BLOCK_C];  // (delta, drive): the drive is delta u, or dy before the gate
  float B[TILE][N_PAD], C[TILE][N_PAD];
  U_T u[2][TILE][BLOCK_C + PAD], z[2][TILE][BLOCK_C + PAD];
  DELTA_T delta[2][TILE][BLOCK_C];
};

static_assert(sizeof(ForwardShared) == SHARED_BYTES, "the host counts the same bytes");

extern __shared__ __align__(16) unsigned char shared_bytes[];

// A thread's place in a (b, l, width) tensor. It goes from tile to tile; rows of a tile are `stride`
// apart, and a thread takes every STEP-th.
template <class T>
struct Feed {
  const T* at;
  long long stride;

  __device__ __forceinline__ Feed() {}
  __device__ __forceinline__ Feed(const void* base, long long b_stride, long long l_stride,
                                  int batch, int row, int column)
      : at(static_cast<const T*>(base) + batch * b_stride + row * l_stride + column),
        stride(l_stride) {}
  __device__ __forceinline__ void move(int rows) { at += rows * stride; }
};

// What a thread copies of a tile: `WIDTH` columns from `column` on, of rows `first`, `first + STEP` ..
template <class T>
struct Share {
  static constexpr int WIDTH = VECTORS ? 16 / sizeof(T) : CHANNELS;
  static constexpr int PER_ROW = BLOCK_C / WIDTH, STEP = THREADS / PER_ROW;
  static constexpr int COUNT = (TILE + STEP - 1) / STEP;
  static __device__ __forceinline__ int column() { return threadIdx.x % PER_ROW * WIDTH; }
  static __device__ __forceinline__ int first() { return threadIdx.x / PER_ROW; }
};

// The first `rows` rows (FULL: all) and `columns` columns of a tile; the rest of `to` stays.
template <bool FULL, class T, int ROW>
__device__ __forceinline__ void copy_tile(T (&to)[TILE][ROW], const Feed<T>& from, int rows,
                                          int columns) {
  using S = Share<T>;
  const int c = S::column();
  const T* at = from.at;
#pragma unroll
  for (int k = 0; k < S::COUNT; ++k, at += S::STEP * from.stride) {
    int t = S::first() + k * S::STEP;
    if (TILE % S::STEP && t >= TILE) break;
    if (!FULL && t >= rows) break;
    if (VECTORS) {
      if (c < columns) copy_async_16(&to[t][c], at);
    } else {
#pragma unroll
      for (int i = 0; i < S::WIDTH; ++i)
        if (c + i < columns) to[t][c + i] = at[i];
    }
  }
}

// Where a block's tiles come from, and its tile of B and C while it is on its way. Gradients are
// driven by dy and C where states are driven by u and B.
template <Walk WALK>
struct Source {
  static constexpr bool GATED = HAS_Z && WALK != ADDED;
  static constexpr int BC_STEP = THREADS / N_PAD;
  Feed<U_T> u, z;
  Feed<DELTA_T> delta;
  Feed<BC_T> B, C;
  int columns;
  bool inside;  // this thread's column of B and C is one of n
  unsigned B_next[BC_PER_THREAD], C_next[BC_PER_THREAD];  // as loaded: to convert is to wait

  __device__ __forceinline__ Source(const Params& p, const Place& w, int t0) {
    int n = threadIdx.x % N_PAD, row = t0 + threadIdx.x / N_PAD;
    inside = n < p.n;
    columns = p.d - w.block * BLOCK_C;
    int column = w.block * BLOCK_C + Share<U_T>::column(), first = t0 + Share<U_T>::first();
    delta = Feed<DELTA_T>(p.delta, p.delta_b, p.delta_l, w.batch,
                          t0 + Share<DELTA_T>::first(),
                          w.block * BLOCK_C + Share<DELTA_T>::column());
    if (GATED) z = Feed<U_T>(p.z, p.z_b, p.z_l, w.batch, first, column);
    C = Feed<BC_T>(p.C, p.C_b, p.C_l, w.batch, row, n);
    if (WALK == GRADIENTS) {
      u = Feed<U_T>(p.dy, p.dy_b, p.dy_l, w.batch, first, column);
      B = C;
    } else {
      u = Feed<U_T>(p.u, p.u_b, p.u_l, w.batch, first, column);
      B = Feed<BC_T>(p.B, p.B_b, p.B_l, w.batch, row, n);
    }
  }

  template <bool FULL>
  __device__ __forceinline__ void load(ForwardShared& s, int rows, int stage) {
    copy_tile<FULL>(s.u[stage], u, rows, columns);
    copy_tile<FULL>(s.delta[stage], delta, rows, columns);
    if (GATED) copy_tile<FULL>(s.z[stage], z, rows, columns);
    const BC_T *B_at = B.at, *C_at = C.at;
#pragma unroll
    for (int k = 0; k < BC_PER_THREAD; ++k) {
      bool here = inside && (FULL || threadIdx.x / N_PAD + k * BC_STEP < rows);
      B_next[k] = here ? bits_of(*B_at) : 0u;
      B_at += BC_STEP * B.stride;
      if (WALK != OUTPUTS) continue;
      C_next[k] = here ? bits_of(*C_at) : 0u;
      C_at += BC_STEP * C.stride;
    }
  }

  // The tile at hand, of which `rows` are left, into a stage.
  __device__ __forceinline__ void request(ForwardShared& s, int rows, int stage) {
    if (rows >= TILE)
      load<true>(s, rows, stage);
    else
      load<false>(s, rows, stage);
  }

  __device__ __forceinline__ void move(int steps) {
    u.move(steps), delta.move(steps), B.move(steps);
    if (GATED) z.move(steps);
    if (WALK == OUTPUTS) C.move(steps);
  }

  // Steps, drives and B, C of the tile that has arrived, once for all threads.
  template <bool FULL>
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
      if (!FULL && t >= rows) step = make_float4(0.f, 0.f, 0.f, 0.f);
      *reinterpret_cast<float4*>(&s.step[t][c]) = step;
    }
#pragma unroll
    for (int k = 0; k < BC_PER_THREAD; ++k) {
      int i = k * THREADS + threadIdx.x;
      if (i >= TILE * N_PAD) break;
      (&s.B[0][0])[i] = from_bits<BC_T>(B_next[k]);
      if (WALK == OUTPUTS) (&s.C[0][0])[i] = from_bits<BC_T>(C_next[k]);
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
  int tiles = (w.end - w.begin + TILE - 1) / TILE, ahead = WALK == GRADIENTS ? -TILE : TILE;
  int t0 = WALK == GRADIENTS ? w.begin + (tiles - 1) * TILE : w.begin;
  U_T* y_at = static_cast<U_T*>(p.y) +
              (static_cast<long long>(w.batch) * p.l + t0 + mine) * p.d + w.channel;
  Source<WALK> source(p, w, t0);
  source.request(s, w.end - t0, 0);
  for (int k = 0, stage = 0; k < tiles; ++k, stage ^= 1, t0 += ahead) {
    int rows = w.end - t0;
    copy_async_wait();
    __syncthreads();
    if (rows >= TILE)
      source.template prepare<true>(s, stage, rows, bias);
    else
      source.template prepare<false>(s, stage, rows, bias);
    __syncthreads();
    source.move(ahead);
    if (k + 1 < tiles) source.request(s, rows - ahead, stage ^ 1);

    if (WALK == OUTPUTS && p.checkpoints && t0 % CHUNK == 0) {
      long long row = (static_cast<long long>(w.batch) * p.chunks + t0 / CHUNK) * p.d + w.channel;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        if (w.channel + c < p.d)
          store_states(static_cast<Part*>(p.checkpoints) + (row + c) * N_PAD, w.lane_n, x[c]);
    }

    for (int i = 0; i < TILE; i += GROUP, y_at += static_cast<long long>(GROUP) * p.d) {
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
        write_pair(y_at + static_cast<long long>(o) * p.d, count, y0, y1);
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
