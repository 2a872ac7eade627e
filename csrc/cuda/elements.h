// Elements of tensors and the numbers that kernels compute with: float, or double for double.
#pragma once

#include <cstdint>

#include "launch.h"

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

// kBytes of consecutive elements, read and written at once.
template <class T, int kBytes = 16>
struct alignas(kBytes) Pack {
  static constexpr int kSize = kBytes / static_cast<int>(sizeof(T));
  T x[kSize];
};

__host__ __device__ inline bool whole_pieces(const void* p, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace ppnet::cuda
