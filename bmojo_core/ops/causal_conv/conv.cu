// Causal depthwise convolution with its activation, forward and backward.
//
//   s_t = sum_{j=0..K-1} w_j x_{t-K+1+j} + bias          y_t = s_t or silu(s_t)
//   dx_t = sum_j w_j ds_{t+K-1-j}     dw_j = sum_t ds_t x_{t-K+1+j}     dbias = sum_t ds_t
//
// A thread takes VECTOR neighbouring channels (8 bytes where the layout allows) and walks through
// `tile` steps with the last K inputs in registers: every byte is read once, but for the K-1 steps
// that neighbouring tiles share.
//
// Defined by the host: X_T (x and y), K (taps), VECTOR, SILU.

constexpr int AHEAD = 8;  // rows requested while as many before them are worked on
constexpr float LOG2_E = 1.4426950408889634f;

struct Params {
  const void *x, *initial, *dy;
  const float *weight, *bias;  // (d, K); (d,)
  void *y, *dx, *dinitial;
  float* partial;  // (b * tiles, d, K + 1): dw and dbias of each tile
  long long x_b, x_l, dy_b, dy_l;
  int b, l, d, tile, tiles;
};

struct Place {
  int channel, batch, begin, end, row;  // row: of `partial`
  bool inside;
};

__device__ __forceinline__ Place locate(const Params& p) {
  int groups = p.d / VECTOR;
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  Place w;
  w.inside = i < static_cast<long long>(groups) * p.tiles * p.b;
  w.channel = static_cast<int>(i % groups) * VECTOR;
  w.row = static_cast<int>(i / groups);
  w.batch = w.row / p.tiles;
  w.begin = w.row % p.tiles * p.tile;
  w.end = min(p.l, w.begin + p.tile);
  return w;
}

struct Row {
  float at[VECTOR];
};

// VECTOR elements as they lie in memory, moved by one instruction: 16 or 8 bytes, or one element.
template <int BYTES> struct Word { X_T element; };
template <> struct Word<16> { uint4 word; };
template <> struct Word<8> { uint2 word; };
using Raw = Word<VECTOR * sizeof(X_T)>;

__device__ __forceinline__ Row widen(const Raw& raw) {
  const X_T* elements = reinterpret_cast<const X_T*>(&raw);
  Row row;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) row.at[i] = to_float(elements[i]);
  return row;
}

__device__ __forceinline__ void store(void* to, const Row& row) {
  Raw raw;
  X_T* elements = reinterpret_cast<X_T*>(&raw);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) put(elements[i], row.at[i]);
  *static_cast<Raw*>(to) = raw;
}

// x_t, or the initial state before the sequence, or zero outside.
__device__ __forceinline__ Raw load_input(const Params& p, const Place& w, int t) {
  const X_T* from = nullptr;
  if (t >= 0 && t < p.l) from = static_cast<const X_T*>(p.x) + w.batch * p.x_b + t * p.x_l;
  if (t < 0 && p.initial)
    from = static_cast<const X_T*>(p.initial) +
           (static_cast<long long>(w.batch) * (K - 1) + t + K - 1) * p.d;
  return from ? *reinterpret_cast<const Raw*>(from + w.channel) : Raw{};
}

__device__ __forceinline__ Raw load_gradient(const Params& p, const Place& w, int t, int last) {
  if (t >= last) return Raw{};
  return *reinterpret_cast<const Raw*>(static_cast<const X_T*>(p.dy) + w.batch * p.dy_b +
                                       t * p.dy_l + w.channel);
}

__device__ __forceinline__ X_T* output_row(const Params& p, const Place& w, void* base, int t) {
  return static_cast<X_T*>(base) + (static_cast<long long>(w.batch) * p.l + t) * p.d + w.channel;
}

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.f + exp2_fast(-x * LOG2_E));
}

struct Filter {
  float w[K][VECTOR], bias[VECTOR];
};

__device__ __forceinline__ Filter load_filter(const Params& p, int channel) {
  Filter f;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    f.bias[i] = p.bias ? p.bias[channel + i] : 0.f;
#pragma unroll
    for (int j = 0; j < K; ++j) f.w[j][i] = p.weight[(channel + i) * K + j];
  }
  return f;
}

// s_t of one row; x holds x_{t-K+1} .. x_t.
__device__ __forceinline__ float filtered(const Filter& f, const Row (&x)[K], int i) {
  float s = f.bias[i];
#pragma unroll
  for (int j = 0; j < K; ++j) s += f.w[j][i] * x[j].at[i];
  return s;
}

__device__ __forceinline__ void push(Row (&window)[K], const Row& newest) {
#pragma unroll
  for (int j = 0; j + 1 < K; ++j) window[j] = window[j + 1];
  window[K - 1] = newest;
}

extern "C" __global__ void conv_forward(const Params p) {
  Place w = locate(p);
  if (!w.inside) return;
  Filter f = load_filter(p, w.channel);
  Row x[K];
#pragma unroll
  for (int j = 1; j < K; ++j) x[j] = widen(load_input(p, w, w.begin - K + j));
  Raw next[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) next[i] = load_input(p, w, w.begin + i);
  for (int t0 = w.begin; t0 < w.end; t0 += AHEAD) {
    Raw now[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      now[i] = next[i];
      next[i] = load_input(p, w, t0 + AHEAD + i);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      push(x, widen(now[i]));
      Row y;
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        float s = filtered(f, x, v);
        y.at[v] = SILU ? s * sigmoid(s) : s;
      }
      if (t0 + i < w.end) store(output_row(p, w, p.y, t0 + i), y);
    }
  }
}

// The walk runs K-1 steps past the tile: dx_t needs ds up to t+K-1.
extern "C" __global__ void conv_backward(const Params p) {
  Place w = locate(p);
  if (!w.inside) return;
  Filter f = load_filter(p, w.channel);
  Row x[K], ds[K] = {}, dw[K] = {}, dbias = {};
#pragma unroll
  for (int j = 1; j < K; ++j) x[j] = widen(load_input(p, w, w.begin - K + j));
  int last = min(p.l, w.end + K - 1);
  for (int t0 = w.begin; t0 < w.end + K - 1; t0 += AHEAD) {
    Raw now_x[AHEAD], now_dy[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      now_x[i] = load_input(p, w, t0 + i);
      now_dy[i] = load_gradient(p, w, t0 + i, last);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      int t = t0 + i, done = t - K + 1;  // dx_done is complete once ds_t is known
      push(x, widen(now_x[i]));
      Row now = widen(now_dy[i]), dx;
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        if (SILU) {
          float s = filtered(f, x, v), gate = sigmoid(s);
          now.at[v] *= gate * (1.f + s * (1.f - gate));
        }
        float own = t < w.end ? now.at[v] : 0.f;
        dbias.at[v] += own;
#pragma unroll
        for (int j = 0; j < K; ++j) dw[j].at[v] += own * x[j].at[v];
      }
      push(ds, now);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        dx.at[v] = 0.f;
#pragma unroll
        for (int j = 0; j < K; ++j) dx.at[v] += f.w[j][v] * ds[K - 1 - j].at[v];
      }
      if (done >= w.begin && done < w.end) store(output_row(p, w, p.dx, done), dx);
      if (done < 0 && w.begin == 0 && p.dinitial)
        store(static_cast<X_T*>(p.dinitial) +
                  (static_cast<long long>(w.batch) * (K - 1) + t) * p.d + w.channel, dx);
    }
  }
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) {
    float* to = p.partial + (static_cast<long long>(w.row) * p.d + w.channel + v) * (K + 1);
#pragma unroll
    for (int j = 0; j < K; ++j) to[j] = dw[j].at[v];
    to[K] = dbias.at[v];
  }
}
