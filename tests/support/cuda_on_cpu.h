// What a CUDA kernel without barriers needs to run as plain C++: one thread after another.
// The intrinsics of ops/_intrinsics.cu are machine instructions there; here they are C++.
#include <algorithm>
#include <cmath>
#include <cstring>

using std::min;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct Index { unsigned x, y, z; };
static thread_local Index blockIdx, threadIdx;

struct bf16 { unsigned short bits; };
struct fp16 { _Float16 value; };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  unsigned bits = static_cast<unsigned>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(fp16 x) { return static_cast<float>(x.value); }

inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // to the nearest, ties to even
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  to.bits = static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void put(fp16& to, float x) { to.value = static_cast<_Float16>(x); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.f / x; }
