// 16 bytes at a time between memory and floats, and sums over warps.
#pragma once

#include <cstdint>

#include "prim.h"

namespace ppnet::cuda {

template <class T>
inline constexpr int kVector = 16 / sizeof(T);  // elements of 16 bytes

__host__ __device__ inline bool aligned_to(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (__is_same(T, float)) return x;
  else if constexpr (__is_same(T, __half)) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// 16 bytes, to which p is aligned. load16: read again, by others too; stream16: read once, first to leave the caches.
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ uint4 stream16(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// The kVector<T> values of 16 bytes, exactly; and back, rounded to nearest.
template <class T>
__device__ __forceinline__ void to_floats(uint4 v, float* x) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (__is_same(T, float)) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 two = unpack<T>(words[i]);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
}
template <class T>
__device__ __forceinline__ uint4 from_floats(const float* x) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (__is_same(T, float)) words[i] = __float_as_uint(x[i]);
    else words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The first n (up to kVector<T>) values from any p, zeros after them; and back.
template <class T>
__device__ __forceinline__ uint4 load_some(const T* p, int n) {
  float x[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) x[i] = i < n ? to_float(p[i]) : 0.0f;
  return from_floats<T>(x);
}
template <class T>
__device__ __forceinline__ void store_some(T* p, const float* x, int n) {
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (i < n) p[i] = from_float<T>(x[i]);
}

// In every lane of a whole warp, in the same order everywhere.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

// Sums over the warp of kCount (a power of two, up to 32) values at once: lane l receives that of values[l * kCount / 32]
// in values[0], with fewer shuffles than one after the other.
template <int kCount>
__device__ __forceinline__ void warp_sums(float* values) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int bit = 16;
#pragma unroll
  for (int count = kCount; count > 1; count /= 2, bit /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const float mine = upper ? values[i + count / 2] : values[i];
      const float others = upper ? values[i] : values[i + count / 2];
      values[i] = mine + __shfl_xor_sync(0xffffffffu, others, bit);
    }
  }
#pragma unroll
  for (; bit > 0; bit /= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], bit);
}

}  // namespace ppnet::cuda
