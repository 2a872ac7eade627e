// 16 bytes at a time between memory and floats, and sums over warps.
#pragma once

#include <cstdint>

#include "elements.h"

namespace ppnet::cuda {

template <class T>
inline constexpr int kVector = 16 / sizeof(T);  // elements of 16 bytes

// 16 bytes, to which p is aligned. load16: read again, by others too; stream16: read once, first to leave the caches.
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ uint4 stream16(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// The values of 4, 8 or 16 bytes, exactly; and back, rounded to nearest.
template <class T>
__device__ __forceinline__ void to_floats(uint32_t bits, float* x) {
  if constexpr (__is_same(T, float)) {
    x[0] = __uint_as_float(bits);
  } else {
    const float2 two = unpack<T>(bits);
    x[0] = two.x;
    x[1] = two.y;
  }
}
template <class T>
__device__ __forceinline__ void to_floats(uint2 v, float* x) {
  to_floats<T>(v.x, x);
  to_floats<T>(v.y, x + kVector<T> / 4);
}
template <class T>
__device__ __forceinline__ void to_floats(uint4 v, float* x) {
  to_floats<T>(make_uint2(v.x, v.y), x);
  to_floats<T>(make_uint2(v.z, v.w), x + kVector<T> / 2);
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
  for (int i = 0; i < kVector<T>; ++i) x[i] = i < n ? widened(p[i]) : 0.0f;
  return from_floats<T>(x);
}
template <class T>
__device__ __forceinline__ void store_some(T* p, const float* x, int n) {
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (i < n) p[i] = rounded<T>(x[i]);
}

// The same, at once where all are there and p is aligned to 16 bytes.
template <class T>
__device__ __forceinline__ uint4 load_part(const T* p, int64_t n, bool aligned) {
  if (n >= kVector<T> && aligned) return load16(p);
  return load_some(p, n > kVector<T> ? kVector<T> : static_cast<int>(n));
}
template <class T>
__device__ __forceinline__ void store_part(T* p, const float* x, int64_t n, bool aligned) {
  if (n >= kVector<T> && aligned) store16(p, from_floats<T>(x));
  else store_some(p, x, n > kVector<T> ? kVector<T> : static_cast<int>(n));
}

// In every lane of a whole warp, in the same order everywhere.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

// Sums over the warp of kCount (a power of two, up to 32) values at once, each in warp_sum's order: lane l receives
// that of values[l * kCount / 32] in values[0], with fewer shuffles than one after the other.
template <int kCount, int kBit = 16>
__device__ __forceinline__ void warp_sums(float* values) {
  if constexpr (kCount > 1) {
    const bool upper = threadIdx.x & kBit;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float mine = upper ? values[i + kCount / 2] : values[i];
      const float others = upper ? values[i] : values[i + kCount / 2];
      values[i] = mine + __shfl_xor_sync(0xffffffffu, others, kBit);
    }
    warp_sums<kCount / 2, kBit / 2>(values);
  } else if constexpr (kBit > 0) {
    values[0] += __shfl_xor_sync(0xffffffffu, values[0], kBit);
    warp_sums<1, kBit / 2>(values);
  }
}

}  // namespace ppnet::cuda
