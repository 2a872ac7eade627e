// Elements of tensors and the numbers that kernels compute with: float, or double for double.
#pragma once

#include <cstdint>
#include <type_traits>

#include "prim.h"

namespace ppnet::cuda {

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T rounded(arithmetic_t<T> x) {
  if constexpr (sizeof(T) >= 4) return x;
  else if constexpr (__is_same(T, __half)) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// kSize consecutive elements, read and written at once. Of 16-bit elements two share a word: apart they would take a
// register each.
template <class T, int kSize>
struct Pack {
  static constexpr bool kWords = sizeof(T) == 2 && kSize % 2 == 0;
  static constexpr int kCount = kWords ? kSize / 2 : kSize;
  using Held = std::conditional_t<kWords, uint32_t, T>;
  alignas(kSize * sizeof(T)) Held x[kCount];

  __device__ __forceinline__ void widen(arithmetic_t<T>* to) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if constexpr (kWords) {
        const float2 two = unpack<T>(x[k]);
        to[2 * k] = two.x;
        to[2 * k + 1] = two.y;
      } else {
        to[k] = widened(x[k]);
      }
    }
  }
  __device__ __forceinline__ void round(const arithmetic_t<T>* from) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if constexpr (kWords) x[k] = pack<T>(from[2 * k], from[2 * k + 1]);
      else x[k] = rounded<T>(from[k]);
    }
  }
};

__host__ __device__ inline bool aligned_to(const void* p, uintptr_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace ppnet::cuda
