// Forward: tiles of TILE steps are copied ahead into shared memory while the tile before them is
// scanned; each tile is first turned into (delta, delta u) and float B, C, once for all threads.

constexpr int TILE = 32;
constexpr int RESIDENT = LANES_N == 4 ? 4 : 1;  // blocks a multiprocessor is to hold
constexpr int BC_PER_THREAD = (TILE * N_PAD + THREADS - 1) / THREADS;

struct alignas(16) ForwardShared {
  float2 step[TILE][BLOCK_C];  // (delta, delta u)
  float B[TILE][N_PAD], C[TILE][N_PAD];
  U_T u[2][TILE][BLOCK_C], z[2][TILE][BLOCK_C];
  DELTA_T delta[2][TILE][BLOCK_C];
};

static_assert(sizeof(ForwardShared) == SHARED_BYTES, "the host counts the same bytes");

extern __shared__ __align__(16) unsigned char shared_bytes[];

template <class T>
__device__ __forceinline__ void copy_tile(const Params& p, const Place& w, T (&to)[TILE][BLOCK_C],
                                          const void* base, long long b_stride,
                                          long long l_stride, int t0) {
  const T* from = static_cast<const T*>(base) + w.batch * b_stride;
  int c0 = w.block * BLOCK_C;
  constexpr int WIDTH = 16 / sizeof(T);
  if (p.vectors) {
    for (int i = threadIdx.x; i < TILE * BLOCK_C / WIDTH; i += THREADS) {
      int t = i / (BLOCK_C / WIDTH), c = i % (BLOCK_C / WIDTH) * WIDTH;
      if (t0 + t < w.end && c0 + c < p.d)
        copy_async_16(&to[t][c], from + (t0 + t) * l_stride + c0 + c);
    }
  } else {
    for (int i = threadIdx.x; i < TILE * BLOCK_C; i += THREADS) {
      int t = i / BLOCK_C, c = i % BLOCK_C;
      if (t0 + t < w.end && c0 + c < p.d) to[t][c] = from[(t0 + t) * l_stride + c0 + c];
    }
  }
}

template <bool OUTPUT>
__device__ __forceinline__ void scan_segment(const Params& p) {
  ForwardShared& s = *reinterpret_cast<ForwardShared*>(shared_bytes);
  Place w = locate(p);
  float A[CHANNELS][STATES], x[CHANNELS][STATES] = {}, time[CHANNELS] = {};
  float D[CHANNELS] = {};
  load_A(p, w, A);
  if (OUTPUT) {
    enter_segment<false>(p, w, p.initial, A, x);
    for (int c = 0; c < CHANNELS; ++c)
      if (p.D && w.channel + c < p.d) D[c] = p.D[w.channel + c];
  }

  float B_next[BC_PER_THREAD], C_next[BC_PER_THREAD];
  auto fetch = [&](int t0, int stage) {
    copy_tile(p, w, s.u[stage], p.u, p.u_b, p.u_l, t0);
    copy_tile(p, w, s.delta[stage], p.delta, p.delta_b, p.delta_l, t0);
    if (OUTPUT && p.z) copy_tile(p, w, s.z[stage], p.z, p.z_b, p.z_l, t0);
#pragma unroll
    for (int k = 0; k < BC_PER_THREAD; ++k) {
      int i = k * THREADS + threadIdx.x, t = t0 + i / N_PAD, n = i % N_PAD;
      if (i >= TILE * N_PAD) break;
      B_next[k] = read_bc(p, p.B, p.B_b, p.B_l, w.batch, t, n);
      if (OUTPUT) C_next[k] = read_bc(p, p.C, p.C_b, p.C_l, w.batch, t, n);
    }
  };

  fetch(w.begin, 0);
  for (int t0 = w.begin, stage = 0; t0 < w.end; t0 += TILE, stage ^= 1) {
    copy_async_wait();
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * BLOCK_C / 2; i += THREADS) {
      int t = i / (BLOCK_C / 2), c = i % (BLOCK_C / 2) * 2, channel = w.block * BLOCK_C + c;
      bool in0 = t0 + t < w.end && channel < p.d, in1 = in0 && channel + 1 < p.d;
      float2 raw = load_pair(&s.delta[stage][t][c]), u = load_pair(&s.u[stage][t][c]);
      float d0 = step_size(p, raw.x, p.bias && in0 ? p.bias[channel] : 0.f, in0);
      float d1 = step_size(p, raw.y, p.bias && in1 ? p.bias[channel + 1] : 0.f, in1);
      *reinterpret_cast<float4*>(&s.step[t][c]) =
          make_float4(d0, in0 ? d0 * u.x : 0.f, d1, in1 ? d1 * u.y : 0.f);
    }
#pragma unroll
    for (int k = 0; k < BC_PER_THREAD; ++k) {
      int i = k * THREADS + threadIdx.x;
      if (i >= TILE * N_PAD) break;
      (&s.B[0][0])[i] = B_next[k];
      if (OUTPUT) (&s.C[0][0])[i] = C_next[k];
    }
    __syncthreads();
    if (t0 + TILE < w.end) fetch(t0 + TILE, stage ^ 1);

    if (OUTPUT && p.checkpoints && t0 % CHUNK == 0) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        long long row = (static_cast<long long>(w.batch) * p.chunks + t0 / CHUNK) * p.d +
                        w.channel + c;
        if (w.channel + c < p.d)
          reinterpret_cast<float4*>(p.checkpoints + row * N_PAD)[w.lane_n] =
              make_float4(x[c][0], x[c][1], x[c][2], x[c][3]);
      }
    }

    for (int g = 0; g < TILE; g += GROUP) {
      float y[CHANNELS][GROUP];
#pragma unroll
      for (int t = 0; t < GROUP; ++t) {
        float4 step = *reinterpret_cast<const float4*>(&s.step[g + t][w.local_c]);
        float4 b4 = reinterpret_cast<const float4*>(s.B[g + t])[w.lane_n];
        float4 c4 = make_float4(0.f, 0.f, 0.f, 0.f);
        if (OUTPUT) c4 = reinterpret_cast<const float4*>(s.C[g + t])[w.lane_n];
        const float B[STATES] = {b4.x, b4.y, b4.z, b4.w}, C[STATES] = {c4.x, c4.y, c4.z, c4.w};
        const float delta[CHANNELS] = {step.x, step.z}, du[CHANNELS] = {step.y, step.w};
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          y[c][t] = 0.f;
          if (!OUTPUT) time[c] += delta[c];
#pragma unroll
          for (int j = 0; j < STATES; ++j) {
            x[c][j] = exp2_fast(delta[c] * A[c][j]) * x[c][j] + du[c] * B[j];
            if (OUTPUT) y[c][t] += C[j] * x[c][j];
          }
        }
      }
      if (!OUTPUT) continue;
      sum_over_states(y[0], w.lane);
      sum_over_states(y[1], w.lane);
      if (w.lane_n >= GROUP) continue;  // more lanes than steps: the first ones write
#pragma unroll
      for (int i = 0; i < OWNED; ++i) {
        int t = g + first_owned(w.lane) + i;
        if (t0 + t >= w.end) continue;
        float2 u = load_pair(&s.u[stage][t][w.local_c]);
        float y0 = y[0][i] + D[0] * u.x, y1 = y[1][i] + D[1] * u.y;
        if (p.z) {
          float2 z = load_pair(&s.z[stage][t][w.local_c]);
          y0 *= z.x * sigmoid(z.x);
          y1 *= z.y * sigmoid(z.y);
        }
        write_pair<U_T>(p, p.y, w.batch, t0 + t, w.channel, y0, y1);
      }
    }
  }

  if (!OUTPUT) {
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
  scan_segment<true>(p);
}

// What each segment but the last adds to the state, and how long it lasts.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_segment_states(const Params p) {
  scan_segment<false>(p);
}
