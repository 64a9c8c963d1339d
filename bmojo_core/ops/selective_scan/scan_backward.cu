// Backward, with g_t = dL/dx_t :
//
//   g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}
//   dC_t = sum_c dy_t x_t        dB_t = sum_c delta_t u_t g_t       d(delta u)_t = sum_n g_t B_t
//   dA = sum_t delta_t q_t       ddelta_t = u_t d(delta u)_t + sum_n A q_t,
//   where q_t = g_t exp(delta_t A) x_{t-1}
//
// A chunk's states are rebuilt from its checkpoint in two levels: one walk through the chunk
// leaves the state before each group of GROUP steps in shared memory, then each group, last
// first, is rebuilt in registers and walked backward.

constexpr int GROUPS = CHUNK / GROUP;
constexpr int KINDS = 2 * STATES;  // a thread's dB and dC of one step

struct alignas(16) BackwardShared {
  float2 step[CHUNK][BLOCK_C];  // (delta, delta u)
  float dy[CHUNK][BLOCK_C];     // gradient of y before the gate
  float B[CHUNK][N_PAD], C[CHUNK][N_PAD];
  float4 start[GROUPS - 1][CHANNELS][THREADS];
  float dbc[2][WARPS][GROUP][2 * N_PAD];
};

static_assert(sizeof(BackwardShared) == SHARED_BYTES, "the host counts the same bytes");

extern __shared__ __align__(16) unsigned char shared_bytes[];

// Sum v over the lanes of the same states. Lane by lane the carried part halves while it can.
__device__ __forceinline__ void sum_over_channels(float (&v)[KINDS], int lane) {
#pragma unroll
  for (int bit = LANES_N, count = KINDS; bit < 32; bit *= 2) {
    if (count > 1) {
      count /= 2;
      bool upper = lane & bit;
#pragma unroll
      for (int i = 0; i < KINDS / 2; ++i) {
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

// Which of the KINDS sums the lane was left with, and how many (KINDS_OWNED).
constexpr int KINDS_OWNED = LANES_C >= KINDS ? 1 : KINDS / LANES_C;
__device__ __forceinline__ int first_kind(int lane) {
  int first = 0;
#pragma unroll
  for (int bit = LANES_N, count = KINDS; bit < 32 && count > 1; bit *= 2) {
    count /= 2;
    first += (lane & bit) ? count : 0;
  }
  return first;
}

// Everything the backward walk reads of steps t0 .. t0 + CHUNK, prepared once for all threads.
template <bool MAIN>
__device__ __forceinline__ void prepare_chunk(const Params& p, const Place& w, BackwardShared& s,
                                              int t0) {
#pragma unroll 4
  for (int i = threadIdx.x; i < CHUNK * BLOCK_C / 2; i += THREADS) {
    int t = i / (BLOCK_C / 2), c = i % (BLOCK_C / 2) * 2, channel = w.block * BLOCK_C + c;
    bool in0 = t0 + t < w.end && channel < p.d, in1 = in0 && channel + 1 < p.d;
    float2 raw = read_pair<DELTA_T>(p, p.delta, p.delta_b, p.delta_l, w.batch, t0 + t, channel);
    float2 dy = read_pair<U_T>(p, p.dy, p.dy_b, p.dy_l, w.batch, t0 + t, channel);
    float2 u = make_float2(0.f, 0.f);
    if (MAIN) u = read_pair<U_T>(p, p.u, p.u_b, p.u_l, w.batch, t0 + t, channel);
    if (p.z) {
      float2 z = read_pair<U_T>(p, p.z, p.z_b, p.z_l, w.batch, t0 + t, channel);
      dy.x *= z.x * sigmoid(z.x);
      dy.y *= z.y * sigmoid(z.y);
    }
    float d0 = step_size(p, raw.x, p.bias && in0 ? p.bias[channel] : 0.f, in0);
    float d1 = step_size(p, raw.y, p.bias && in1 ? p.bias[channel + 1] : 0.f, in1);
    *reinterpret_cast<float4*>(&s.step[t][c]) = make_float4(d0, d0 * u.x, d1, d1 * u.y);
    *reinterpret_cast<float2*>(&s.dy[t][c]) =
        make_float2(in0 ? dy.x : 0.f, in1 ? dy.y : 0.f);
  }
  for (int i = threadIdx.x; i < CHUNK * N_PAD; i += THREADS) {
    int t = t0 + i / N_PAD, n = i % N_PAD;
    if (MAIN) (&s.B[0][0])[i] = read_bc(p, p.B, p.B_b, p.B_l, w.batch, t, n);
    (&s.C[0][0])[i] = read_bc(p, p.C, p.C_b, p.C_l, w.batch, t, n);
  }
}

// What each segment but the first passes to the gradient of the state before it.
extern "C" __global__ void __launch_bounds__(THREADS) scan_segment_gradients(const Params p) {
  BackwardShared& s = *reinterpret_cast<BackwardShared*>(shared_bytes);
  Place w = locate(p);
  if (w.segment == 0) return;
  float A[CHANNELS][STATES], g[CHANNELS][STATES] = {}, time[CHANNELS] = {};
  load_A(p, w, A);
  for (int t0 = w.begin + (w.end - 1 - w.begin) / CHUNK * CHUNK; t0 >= w.begin; t0 -= CHUNK) {
    __syncthreads();
    prepare_chunk<false>(p, w, s, t0);
    __syncthreads();
#pragma unroll 8
    for (int t = CHUNK - 1; t >= 0; --t) {
      float4 step = *reinterpret_cast<const float4*>(&s.step[t][w.local_c]);
      float2 dy2 = *reinterpret_cast<const float2*>(&s.dy[t][w.local_c]);
      float4 c4 = reinterpret_cast<const float4*>(s.C[t])[w.lane_n];
      const float C[STATES] = {c4.x, c4.y, c4.z, c4.w};
      const float delta[CHANNELS] = {step.x, step.z}, dy[CHANNELS] = {dy2.x, dy2.y};
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        time[c] += delta[c];
#pragma unroll
        for (int j = 0; j < STATES; ++j)
          g[c][j] = exp2_fast(delta[c] * A[c][j]) * (C[j] * dy[c] + g[c][j]);
      }
    }
  }
  store_segment(p, w, g, time);
}

struct Sums {  // over this thread's time steps
  float A[CHANNELS][STATES], D[CHANNELS], bias[CHANNELS];
};

// Gradients of u, delta and z for the steps and the two channels whose sums this lane owns.
__device__ __forceinline__ void finish_steps(const Params& p, const Place& w, BackwardShared& s,
                                             int t0, int group, const float (&D)[CHANNELS],
                                             const float (&y)[CHANNELS][GROUP],
                                             const float (&dstep)[CHANNELS][GROUP],
                                             const float (&dtime)[CHANNELS][GROUP], Sums& sums,
                                             const float2 (&u)[OWNED], const float2 (&z)[OWNED],
                                             const float2 (&dout)[OWNED]) {
#pragma unroll
  for (int i = 0; i < OWNED; ++i) {
    int t = group * GROUP + first_owned(w.lane) + i;
    float4 step = *reinterpret_cast<const float4*>(&s.step[t][w.local_c]);
    float2 dy2 = *reinterpret_cast<const float2*>(&s.dy[t][w.local_c]);
    const float delta[CHANNELS] = {step.x, step.z}, dy[CHANNELS] = {dy2.x, dy2.y};
    const float uu[CHANNELS] = {u[i].x, u[i].y}, zz[CHANNELS] = {z[i].x, z[i].y};
    const float dd[CHANNELS] = {dout[i].x, dout[i].y};
    float du[CHANNELS], ddelta[CHANNELS], dz[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      du[c] = delta[c] * dstep[c][i] + D[c] * dy[c];
      ddelta[c] = uu[c] * dstep[c][i] + LN_2 * dtime[c][i];
      if (p.softplus) ddelta[c] *= softplus_slope(delta[c]);
      float gate = sigmoid(zz[c]);
      dz[c] = dd[c] * (y[c][i] + D[c] * uu[c]) * gate * (1.f + zz[c] * (1.f - gate));
      if (t0 + t < w.end) {
        sums.D[c] += dy[c] * uu[c];
        sums.bias[c] += ddelta[c];
      }
    }
    if (t0 + t >= w.end) continue;
    write_pair<U_T>(p, p.du, w.batch, t0 + t, w.channel, du[0], du[1]);
    write_pair<DELTA_T>(p, p.ddelta, w.batch, t0 + t, w.channel, ddelta[0], ddelta[1]);
    if (p.z) write_pair<U_T>(p, p.dz, w.batch, t0 + t, w.channel, dz[0], dz[1]);
  }
}

// One group of steps: rebuild its states, walk backward, hand out the sums.
__device__ __forceinline__ void group_backward(const Params& p, const Place& w, BackwardShared& s,
                                               int t0, int group, const float (&A)[CHANNELS][STATES],
                                               const float (&D)[CHANNELS],
                                               const float (&start)[CHANNELS][STATES],
                                               float (&g)[CHANNELS][STATES], Sums& sums) {
  float2 u[OWNED], z[OWNED], dout[OWNED];  // read early, used last
#pragma unroll
  for (int i = 0; i < OWNED; ++i) {
    int t = t0 + group * GROUP + first_owned(w.lane) + i;
    u[i] = read_pair<U_T>(p, p.u, p.u_b, p.u_l, w.batch, t, w.channel);
    z[i] = dout[i] = make_float2(0.f, 0.f);
    if (p.z) {
      z[i] = read_pair<U_T>(p, p.z, p.z_b, p.z_l, w.batch, t, w.channel);
      dout[i] = read_pair<U_T>(p, p.dy, p.dy_b, p.dy_l, w.batch, t, w.channel);
    }
  }
  float x[GROUP][CHANNELS][STATES], a[GROUP][CHANNELS][STATES];
  float y[CHANNELS][GROUP], dstep[CHANNELS][GROUP], dtime[CHANNELS][GROUP];
#pragma unroll
  for (int t = 0; t < GROUP; ++t) {
    int row = group * GROUP + t;
    float4 step = *reinterpret_cast<const float4*>(&s.step[row][w.local_c]);
    float4 b4 = reinterpret_cast<const float4*>(s.B[row])[w.lane_n];
    float4 c4 = reinterpret_cast<const float4*>(s.C[row])[w.lane_n];
    const float B[STATES] = {b4.x, b4.y, b4.z, b4.w}, C[STATES] = {c4.x, c4.y, c4.z, c4.w};
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
  if (p.z) {
    sum_over_states(y[0], w.lane);
    sum_over_states(y[1], w.lane);
  }
  float(*dbc)[2 * N_PAD] = s.dbc[group & 1][w.warp];
#pragma unroll
  for (int t = GROUP - 1; t >= 0; --t) {
    int row = group * GROUP + t;
    float4 step = *reinterpret_cast<const float4*>(&s.step[row][w.local_c]);
    float2 dy2 = *reinterpret_cast<const float2*>(&s.dy[row][w.local_c]);
    float4 b4 = reinterpret_cast<const float4*>(s.B[row])[w.lane_n];
    float4 c4 = reinterpret_cast<const float4*>(s.C[row])[w.lane_n];
    const float B[STATES] = {b4.x, b4.y, b4.z, b4.w}, C[STATES] = {c4.x, c4.y, c4.z, c4.w};
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
  if (w.lane_n < GROUP)
    finish_steps(p, w, s, t0, group, D, y, dstep, dtime, sums, u, z, dout);
}

extern "C" __global__ void __launch_bounds__(THREADS) scan_gradients(const Params p) {
  BackwardShared& s = *reinterpret_cast<BackwardShared*>(shared_bytes);
  Place w = locate(p);
  float A[CHANNELS][STATES], g[CHANNELS][STATES], D[CHANNELS] = {};
  Sums sums = {};
  load_A(p, w, A);
  enter_segment<true>(p, w, p.dlast, A, g);
  for (int c = 0; c < CHANNELS; ++c)
    if (p.D && w.channel + c < p.d) D[c] = p.D[w.channel + c];

  for (int t0 = w.begin + (w.end - 1 - w.begin) / CHUNK * CHUNK; t0 >= w.begin; t0 -= CHUNK) {
    prepare_chunk<true>(p, w, s, t0);
    float x[CHANNELS][STATES] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      long long row = (static_cast<long long>(w.batch) * p.chunks + t0 / CHUNK) * p.d +
                      w.channel + c;
      if (w.channel + c >= p.d) continue;
      float4 state = reinterpret_cast<const float4*>(p.checkpoints + row * N_PAD)[w.lane_n];
      x[c][0] = state.x, x[c][1] = state.y, x[c][2] = state.z, x[c][3] = state.w;
    }
    __syncthreads();
    for (int group = 0; group < GROUPS - 1; ++group) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        s.start[group][c][threadIdx.x] = make_float4(x[c][0], x[c][1], x[c][2], x[c][3]);
#pragma unroll
      for (int t = 0; t < GROUP; ++t) {
        int row = group * GROUP + t;
        float4 step = *reinterpret_cast<const float4*>(&s.step[row][w.local_c]);
        float4 b4 = reinterpret_cast<const float4*>(s.B[row])[w.lane_n];
        const float B[STATES] = {b4.x, b4.y, b4.z, b4.w};
        const float delta[CHANNELS] = {step.x, step.z}, du[CHANNELS] = {step.y, step.w};
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
          for (int j = 0; j < STATES; ++j)
            x[c][j] = exp2_fast(delta[c] * A[c][j]) * x[c][j] + du[c] * B[j];
      }
    }
    for (int group = GROUPS - 1; group >= 0; --group) {
      if (group < GROUPS - 1) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          float4 state = s.start[group][c][threadIdx.x];
          x[c][0] = state.x, x[c][1] = state.y, x[c][2] = state.z, x[c][3] = state.w;
        }
      }
      group_backward(p, w, s, t0, group, A, D, x, g, sums);
      __syncthreads();
      long long row = (static_cast<long long>(w.block) * p.b + w.batch) * p.l + t0 + group * GROUP;
      for (int i = threadIdx.x; i < GROUP * 2 * N_PAD; i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < WARPS; ++k) sum += (&s.dbc[group & 1][k][0][0])[i];
        if (t0 + group * GROUP + i / (2 * N_PAD) < w.end) p.dbc[row * (2 * N_PAD) + i] = sum;
      }
    }
  }

#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (LANES_N > GROUP && w.lane_n >= GROUP) sums.D[c] = sums.bias[c] = 0.f;
#pragma unroll
    for (int bit = 1; bit < LANES_N; bit *= 2) {
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
    for (int k = 0; k < blocks; ++k) sum += p.dbc[k * size + i];
    int n = i % N_PAD;
    BC_T* to = static_cast<BC_T*>((i / N_PAD) % 2 ? p.dC : p.dB);
    if (n < p.n) put(to[i / (2 * N_PAD) * p.n + n], sum);
  }
}
