// A block's threads on one CPU thread: each has a stack of its own and runs until it must wait for
// others. What nobody may count on is made to show: shared memory begins as NaN, an asynchronous
// copy arrives when it is waited for and no earlier, and every second block runs its threads from
// the last to the first, so that a missing barrier finds what it protects unwritten, or
// overwritten.
#include <csetjmp>
#include <ucontext.h>

struct Index { unsigned x, y, z; };
Index blockIdx, threadIdx, gridDim, blockDim;

constexpr unsigned MOST_SHARED = 227 * 1024;
alignas(16) unsigned char shared_bytes[MOST_SHARED];

namespace on_cpu {  // its names are not the kernels'

constexpr unsigned MOST_THREADS = 512, WARP = 32, MOST_COPIES = 64, STACK = 64 * 1024;

struct Meeting {  // a barrier: nobody leaves before all that are left have come
  unsigned members, here, turn;
};

struct Lane {  // what a thread shows the other 31: in turns, so that none is overwritten unread
  float shown[2][4];
};

struct Copy { void* to; const void* from; };

struct Fiber {
  jmp_buf at;
  bool started, done;
  unsigned turn, copies;  // meetings of its warp so far; copies on their way
  Copy copy[MOST_COPIES];
};

Fiber fibers[MOST_THREADS];
Lane lanes[MOST_THREADS];
Meeting block, warps[MOST_THREADS / WARP];
alignas(64) unsigned char stacks[MOST_THREADS][STACK];
jmp_buf scheduler;
unsigned steps;  // arrivals and ends: a round without any is a deadlock
void (*body)();

inline Fiber& self() { return fibers[threadIdx.x]; }

__attribute__((noinline)) void yield() {
  if (_setjmp(self().at) == 0) _longjmp(scheduler, 1);
}

inline void release_if_complete(Meeting& m) {
  if (m.here == m.members) m.here = 0, ++m.turn;
}

inline void meet(Meeting& m) {
  unsigned turn = m.turn;
  ++m.here, ++steps;
  release_if_complete(m);
  while (m.turn == turn) yield();
}

inline void leave(Meeting& m) {
  --m.members, ++steps;
  if (m.members) release_if_complete(m);
}

void run_fiber() {
  body();
  self().done = true;
  // who asks this lane from now on gets NaN; what it showed last may not have been read yet
  std::memset(lanes[threadIdx.x].shown[self().turn & 1], 0xff, sizeof(Lane::shown[0]));
  leave(warps[threadIdx.x / WARP]);
  leave(block);
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume() {
  static ucontext_t start;
  if (_setjmp(scheduler) != 0) return;
  if (self().started) _longjmp(self().at, 1);
  self().started = true;
  getcontext(&start);
  start.uc_stack.ss_sp = stacks[threadIdx.x];
  start.uc_stack.ss_size = STACK;
  start.uc_link = nullptr;
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
}

// One block, to its end; false if its threads wait for each other for ever.
inline bool run_block() {
  unsigned threads = blockDim.x;
  std::memset(shared_bytes, 0xff, sizeof(shared_bytes));
  std::memset(lanes, 0xff, sizeof(Lane) * threads);
  block = {threads, 0, 0};
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].started = fibers[i].done = false;
    fibers[i].turn = fibers[i].copies = 0;
    warps[i / WARP] = {min(WARP, threads - i / WARP * WARP), 0, 0};
  }
  bool reversed = (blockIdx.x + blockIdx.y) % 2;
  while (block.members) {
    unsigned before = steps;
    for (unsigned i = 0; i < threads; ++i) {
      threadIdx.x = reversed ? threads - 1 - i : i;
      if (!self().done) resume();
    }
    if (steps == before) return false;
  }
  return true;
}

// Every block, one after another; false as soon as one does not end.
inline bool run_grid(void (*kernel)(), unsigned x, unsigned y, unsigned z, unsigned threads) {
  body = kernel, gridDim = {x, y, z}, blockDim = {threads, 1, 1};
  for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
        if (!run_block()) return false;
  return true;
}

// Show up to four numbers to the warp; what the lanes of the warp showed.
struct Shown {
  const Lane* first;
  unsigned turn;
  float operator()(unsigned lane, unsigned i) const { return first[lane].shown[turn][i]; }
};
inline Shown show(float a, float b = 0, float c = 0, float d = 0) {
  unsigned turn = self().turn++ & 1, warp = threadIdx.x / WARP;
  float* mine = lanes[threadIdx.x].shown[turn];
  mine[0] = a, mine[1] = b, mine[2] = c, mine[3] = d;
  meet(warps[warp]);
  return {lanes + warp * WARP, turn};
}

// An operand of the matrix units has not a float's last 13 bits.
inline float tf32(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  bits &= ~0x1fffu;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::meet(on_cpu::block); }

inline float __shfl_xor_sync(unsigned, float x, unsigned bits) {
  unsigned other = (threadIdx.x % on_cpu::WARP) ^ bits;
  return on_cpu::show(x)(other, 0);
}

// D += A B, whose places on the lanes ops/_intrinsics.cu tells.
inline void multiply_accumulate(float (&d)[4], float upper_left, float lower_right, float b0,
                                float b1) {
  using namespace on_cpu;
  Shown all = show(tf32(upper_left), tf32(lower_right), tf32(b0), tf32(b1));
  unsigned lane = threadIdx.x % WARP, row = lane / 4;
  for (unsigned half = 0; half < 2; ++half)  // rows 0..7 and 8..15
    for (unsigned e = 0; e < 2; ++e)
      for (unsigned k = 0; k < 4; ++k) {
        unsigned column = 2 * (lane % 4) + e;
        d[2 * half + e] += all(4 * row + k, half) * all(4 * column + k, 2 + half);
      }
}

inline void copy_async_16(void* to, const void* from) {
  auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  on_cpu::Fiber& f = on_cpu::self();
  if ((address(to) | address(from)) % 16 || f.copies == on_cpu::MOST_COPIES) __builtin_trap();
  std::memset(to, 0xff, 16);  // from now on it may change at any moment
  f.copy[f.copies++] = {to, from};
}
inline void copy_async_wait() {
  on_cpu::Fiber& f = on_cpu::self();
  for (unsigned i = 0; i < f.copies; ++i) std::memcpy(f.copy[i].to, f.copy[i].from, 16);
  f.copies = 0;
}
