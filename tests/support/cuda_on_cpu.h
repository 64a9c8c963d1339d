// What a CUDA kernel needs to run as plain C++: its words, its vector types, and, in C++, the
// machine instructions of ops/_intrinsics.cu. Threads that wait for each other, and what they
// exchange when they meet, are in cuda_threads_on_cpu.h.
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Not <algorithm> and <cmath>: to read them takes a quarter of a compilation.
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }
inline float fabsf(float x) { return __builtin_fabsf(x); }
inline float fmaxf(float x, float y) { return __builtin_fmaxf(x, y); }

#include "cuda_threads_on_cpu.h"

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }

struct bf16 { unsigned short bits; };
struct fp16 { _Float16 value; };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline float to_float(fp16 x) { return static_cast<float>(x.value); }

inline unsigned bits_of(float x) { return __float_as_uint(x); }
inline unsigned bits_of(bf16 x) { return x.bits; }
inline unsigned bits_of(fp16 x) { return same_bits<unsigned short>(x); }
template <class T>
inline float from_bits(unsigned bits) {
  return to_float(same_bits<T>(static_cast<unsigned short>(bits)));
}
template <>
inline float from_bits<float>(unsigned bits) { return __uint_as_float(bits); }

inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // to the nearest, ties to even
  unsigned bits = __float_as_uint(x);
  unsigned short rounded = static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  to.bits = x == x ? rounded : 0x7fff;  // the carry would make a number of a NaN
}
inline void put(fp16& to, float x) { to.value = static_cast<_Float16>(x); }

inline float exp2_fast(float x) { return __builtin_exp2f(x); }
inline float log2_fast(float x) { return __builtin_log2f(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline void prefetch(const void*) {}

template <class T>
struct alignas(2 * sizeof(T)) Pair { T first, second; };
template <class T>
inline float2 load_pair(const T* p) {
  Pair<T> v = *reinterpret_cast<const Pair<T>*>(p);
  return make_float2(to_float(v.first), to_float(v.second));
}
