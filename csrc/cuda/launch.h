// What every .cu file includes: CUDA's headers under nvcc, the emulator under g++, and one way to launch in both.
#pragma once

#undef NDEBUG  // kernels keep their assertions in release builds
#include <cassert>
#include <utility>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulator/cuda.h"
#endif

namespace ppnet::cuda {

// kernel<<<grid, block, shared_bytes, stream>>>(args...); more than 48 KB of dynamic shared memory is asked for.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
#ifdef __CUDACC__
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(std::forward<Args>(args)...);
  return cudaGetLastError();
#else
  (void)stream;
  return emulator::start(kernel, grid, block, shared_bytes, std::forward<Args>(args)...);
#endif
}

// The block's dynamic shared memory, aligned to 128 bytes: `extern __shared__` in both.
template <class T = unsigned char>
__device__ inline T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
#else
  return reinterpret_cast<T*>(emulator::block.shared);
#endif
}

}  // namespace ppnet::cuda
