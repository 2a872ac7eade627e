// Arithmetic of sizes for bindings, launchers and kernels: what a binding allocates is what a kernel indexes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PPNET_HOST_DEVICE __host__ __device__
#else
#define PPNET_HOST_DEVICE
#endif

namespace ppnet::cuda {

PPNET_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns between rows that are read and written by whole vectors of every dtype, such as partial sums.
PPNET_HOST_DEVICE constexpr int64_t whole_pitch(int64_t width) { return ceil_div(width, 8) * 8; }

}  // namespace ppnet::cuda
