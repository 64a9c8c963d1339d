// Element types and the few machine instructions the run-time compiled kernels use.
// Written without any CUDA header, so that NVRTC needs nothing but this text.

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// An element as it was loaded, for use later.
__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ unsigned bits_of(bf16 x) { return x.bits; }
__device__ __forceinline__ unsigned bits_of(fp16 x) { return x.bits; }
template <class T>
__device__ __forceinline__ float from_bits(unsigned bits) {
  T x;
  x.bits = static_cast<unsigned short>(bits);
  return to_float(x);
}
template <>
__device__ __forceinline__ float from_bits<float>(unsigned bits) { return __uint_as_float(bits); }

__device__ __forceinline__ void put(float& to, float x) { to = x; }
__device__ __forceinline__ void put(bf16& to, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
__device__ __forceinline__ void put(fp16& to, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}

// 2^x, log2(x), 1/x on the special-function units (relative error about 2^-22).
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes from device memory to shared memory, without passing through registers.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global));
}
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}

// Ask for the line of an address, so that it is near when it is read.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

template <class T>
struct alignas(2 * sizeof(T)) Pair { T first, second; };

template <class T>
__device__ __forceinline__ float2 load_pair(const T* p) {
  Pair<T> v = *reinterpret_cast<const Pair<T>*>(p);
  return make_float2(to_float(v.first), to_float(v.second));
}

// D += A B on the matrix units, in tf32 with float32 sums. A (16 x 8) has two blocks that are not
// zero: `upper_left` in rows 0..7 of columns 0..3 and `lower_right` in rows 8..15 of columns 4..7;
// lane i holds row i / 4, column i % 4 of each. B (8 x 8): lane i holds row i % 4 and row
// 4 + i % 4 of column i / 4. D (16 x 8): lane i holds row i / 4 and, in the last two places, row
// 8 + i / 4 of columns 2 (i % 4) and 2 (i % 4) + 1.
__device__ __forceinline__ void multiply_accumulate(float (&d)[4], float upper_left,
                                                    float lower_right, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(upper_left)), "r"(0), "r"(0), "r"(__float_as_uint(lower_right)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
