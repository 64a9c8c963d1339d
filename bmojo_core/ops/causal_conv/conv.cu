// Causal depthwise convolution with its activation, forward and backward.
//
//   s_t = sum_{j=0..K-1} w_j x_{t-K+1+j} + bias          y_t = s_t or silu(s_t)
//   dx_t = sum_j w_j ds_{t+K-1-j}     dw_j = sum_t ds_t x_{t-K+1+j}     dbias = sum_t ds_t
//
// A thread takes VECTOR neighbouring channels (8 bytes where layout and registers allow) and walks
// through a tile of steps with the last K inputs in registers. What it would spend beside the sums
// is instructions: so its pointers go from row to row, the rows of a tile that come in whole groups
// are read without asking whether they are there, and nothing past the tile is read but the K-1
// steps that a gradient needs from its neighbour.
//
// Defined by the host: X_T (x and y), K (taps), VECTOR, SILU; for each pass the rows requested at
// once (.._AHEAD) and the blocks of 128 threads a multiprocessor shall hold (.._BLOCKS).

constexpr int THREADS = 128;
constexpr float LOG2_E = 1.4426950408889634f;

struct Params {
  const void *x, *dy;
  const float *initial, *weight, *bias;  // (b, K-1, d); (d, K); (d,)
  void *y, *dx;
  float *dinitial, *partial;  // partial (b * tiles, K + 1, d): dw and dbias of each tile
  long long x_b, x_l, dy_b, dy_l;
  int b, l, d, tile, tiles;
};

struct Place {
  int channel, batch, begin, rows, part;  // part: of `partial`
  bool inside;
};

__device__ __forceinline__ Place locate(const Params& p) {
  unsigned groups = p.d / VECTOR;
  unsigned long long i = static_cast<unsigned long long>(blockIdx.x) * THREADS + threadIdx.x;
  Place w;
  w.inside = i < static_cast<unsigned long long>(groups) * p.tiles * p.b;
  w.part = static_cast<int>(i / groups);
  w.channel = static_cast<int>(i - static_cast<unsigned long long>(w.part) * groups) * VECTOR;
  w.batch = w.part / p.tiles;
  w.begin = w.part % p.tiles * p.tile;
  w.rows = min(p.tile, p.l - w.begin);
  return w;
}

struct alignas(4 * VECTOR) Row {
  float at[VECTOR];
};

// VECTOR elements as they lie in memory, moved by one instruction.
template <int BYTES> struct Word { X_T element; };
template <> struct Word<8> { uint2 word; };
template <> struct Word<4> { unsigned word; };
using Raw = Word<VECTOR * sizeof(X_T)>;

__device__ __forceinline__ Row widen(const Raw& raw) {
  const X_T* elements = reinterpret_cast<const X_T*>(&raw);
  Row row;
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) row.at[v] = to_float(elements[v]);
  return row;
}

// A place in a (b, l, d) tensor that goes from row to row.
struct Walk {
  char* at;
  long long step;

  __device__ __forceinline__ Walk(const void* base, long long b_stride, long long l_stride,
                                  const Place& w)
      : at(static_cast<char*>(const_cast<void*>(base)) +
           (w.batch * b_stride + w.begin * l_stride + w.channel) * static_cast<int>(sizeof(X_T))),
        step(l_stride * static_cast<int>(sizeof(X_T))) {}

  __device__ __forceinline__ Raw take() {
    Raw raw = *reinterpret_cast<const Raw*>(at);
    at += step;
    return raw;
  }

  __device__ __forceinline__ void put_down(const Row& row) {
    Raw raw;
    X_T* elements = reinterpret_cast<X_T*>(&raw);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) put(elements[v], row.at[v]);
    *reinterpret_cast<Raw*>(at) = raw;
    at += step;
  }
};

__device__ __forceinline__ float* initial_row(float* base, const Params& p, const Place& w, int t) {
  return base + (static_cast<long long>(w.batch) * (K - 1) + t + K - 1) * p.d + w.channel;
}

// The K-1 inputs before the tile, in x[1] .. x[K-1]: of the tile before, or the initial state.
__device__ __forceinline__ void load_history(const Params& p, const Place& w, Row (&x)[K]) {
#pragma unroll
  for (int j = 1; j < K; ++j) {
    int t = w.begin - K + j;
    x[j] = Row{};
    if (t >= 0)
      x[j] = widen(*reinterpret_cast<const Raw*>(static_cast<const X_T*>(p.x) + w.batch * p.x_b +
                                                 t * p.x_l + w.channel));
    else if (p.initial)
      x[j] = *reinterpret_cast<const Row*>(
          initial_row(const_cast<float*>(p.initial), p, w, t));
  }
}

struct Filter {
  float w[K][VECTOR], bias[VECTOR];
};

__device__ __forceinline__ Filter load_filter(const Params& p, int channel) {
  Filter f;
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) {
    f.bias[v] = p.bias ? p.bias[channel + v] : 0.f;
#pragma unroll
    for (int j = 0; j < K; ++j) f.w[j][v] = p.weight[(channel + v) * K + j];
  }
  return f;
}

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.f + exp2_fast(-x * LOG2_E));
}

// s_t of one channel; x holds x_{t-K+1} .. x_t.
__device__ __forceinline__ float filtered(const Filter& f, const Row (&x)[K], int v) {
  float s = f.bias[v];
#pragma unroll
  for (int j = 0; j < K; ++j) s += f.w[j][v] * x[j].at[v];
  return s;
}

__device__ __forceinline__ void push(Row (&window)[K], const Row& newest) {
#pragma unroll
  for (int j = 0; j + 1 < K; ++j) window[j] = window[j + 1];
  window[K - 1] = newest;
}

__device__ __forceinline__ Row output(const Filter& f, Row (&x)[K], const Raw& newest) {
  push(x, widen(newest));
  Row y;
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) {
    float s = filtered(f, x, v);
    y.at[v] = SILU ? s * sigmoid(s) : s;
  }
  return y;
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    conv_forward(const Params p) {
  constexpr int AHEAD = FORWARD_AHEAD;
  Place w = locate(p);
  if (!w.inside) return;
  Filter f = load_filter(p, w.channel);
  Row x[K];
  load_history(p, w, x);
  Walk in(p.x, p.x_b, p.x_l, w), out(p.y, static_cast<long long>(p.l) * p.d, p.d, w);
  int groups = w.rows / AHEAD;
  if (groups) {
    Raw next[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) next[i] = in.take();
#pragma unroll 1
    for (int k = 1; k < groups; ++k) {
      Raw now[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        now[i] = next[i];
        next[i] = in.take();
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) out.put_down(output(f, x, now[i]));
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) out.put_down(output(f, x, next[i]));
  }
#pragma unroll 1
  for (int i = groups * AHEAD; i < w.rows; ++i) out.put_down(output(f, x, in.take()));
}

struct Gradients {
  Row x[K], ds[K] = {}, dw[K] = {}, dbias = {};
};

// One step back into the filter: dx_{t-K+1}, which is complete once ds_t is known. Steps past the
// tile (not `own`) belong to the sums of the next.
__device__ __forceinline__ Row input_gradient(const Filter& f, Gradients& g, const Row& x,
                                              const Row& dy, bool own) {
  push(g.x, x);
  Row ds = dy, dx;
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) {
    if (SILU) {
      float s = filtered(f, g.x, v), gate = sigmoid(s);
      ds.at[v] *= gate * (1.f + s * (1.f - gate));
    }
    if (own) {
      g.dbias.at[v] += ds.at[v];
#pragma unroll
      for (int j = 0; j < K; ++j) g.dw[j].at[v] += ds.at[v] * g.x[j].at[v];
    }
  }
  push(g.ds, ds);
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) {
    dx.at[v] = 0.f;
#pragma unroll
    for (int j = 0; j < K; ++j) dx.at[v] += f.w[j][v] * g.ds[K - 1 - j].at[v];
  }
  return dx;
}

// The walk runs K-1 steps past the tile. Its first K-1 steps complete gradients of rows before the
// tile: the initial state's, or those that the tile before has computed itself.
extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    conv_backward(const Params p) {
  constexpr int AHEAD = BACKWARD_AHEAD;
  Place w = locate(p);
  if (!w.inside) return;
  Filter f = load_filter(p, w.channel);
  Gradients g;
  load_history(p, w, g.x);
  Walk in(p.x, p.x_b, p.x_l, w), dy(p.dy, p.dy_b, p.dy_l, w);
  Walk out(p.dx, static_cast<long long>(p.l) * p.d, p.d, w);
  float* dinitial = w.begin == 0 ? p.dinitial : nullptr;
  int i = 0;
#pragma unroll 1
  for (; i < min(K - 1, w.rows); ++i) {
    Row dx = input_gradient(f, g, widen(in.take()), widen(dy.take()), true);
    if (dinitial) *reinterpret_cast<Row*>(initial_row(dinitial, p, w, i - K + 1)) = dx;
  }
#pragma unroll 1
  for (; i + AHEAD <= w.rows; i += AHEAD) {
    Raw now_x[AHEAD], now_dy[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      now_x[k] = in.take();
      now_dy[k] = dy.take();
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k)
      out.put_down(input_gradient(f, g, widen(now_x[k]), widen(now_dy[k]), true));
  }
#pragma unroll 1
  for (; i < w.rows + K - 1; ++i) {
    bool there = w.begin + i < p.l;
    Row x = there ? widen(in.take()) : Row{}, after = there ? widen(dy.take()) : Row{};
    Row dx = input_gradient(f, g, x, after, i < w.rows);
    if (i >= K - 1)
      out.put_down(dx);
    else if (dinitial)
      *reinterpret_cast<Row*>(initial_row(dinitial, p, w, i - K + 1)) = dx;
  }
  float* sums = p.partial + static_cast<long long>(w.part) * (K + 1) * p.d + w.channel;
#pragma unroll
  for (int j = 0; j < K; ++j) *reinterpret_cast<Row*>(sums + j * p.d) = g.dw[j];
  *reinterpret_cast<Row*>(sums + K * p.d) = g.dbias;
}
