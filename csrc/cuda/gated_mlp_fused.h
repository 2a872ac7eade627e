// Launcher of gated_mlp_fused on NVIDIA GPUs. Torch-free: the binding checks, allocates and fills this.
#pragma once

#include <cstdint>

#include "cpu/act.h"
#include "cpu/dtype.h"
#include "sizes.h"

namespace ppnet::cuda {

// Sizes of the tiles that a block computes: tokens by columns (a neuron has a column for up and one for gate).
enum class MlpTile : int32_t { t32x64 = 1, t64x128 = 2, t128x128 = 3 };

struct MlpPlan {
  MlpTile hidden, down;  // of h (T, K), and of y (T, N)
  int32_t splits;        // of the neurons, whose parts of y are summed by another kernel; 1: none, 0: there are no neurons
};

// y (T, N) = h down[idx] + down_bias with h (T, K) = z · act(x gate[idx]ᵀ + gate_bias) · (x up[idx]ᵀ + up_bias).
// bf16 or f16 throughout, sums in float. Rows are contiguous, strides in elements. Sizes are at most 2³⁰.
struct GatedMlp {
  const void *x, *up, *gate, *down;  // (T, D), (F, D), (F, D), (F, N)
  const void *up_bias, *gate_bias, *down_bias;  // (F), (F), (N), each or null
  const int64_t* idx;                // (K), or null: all
  const float* z;                    // (K), or null: 1
  void* h;                           // workspace (T, h_stride), h_stride a multiple of 8, aligned to 16 bytes
  float* partial;                    // workspace (splits, T, partial_stride), a multiple of 8; with more than one split
  void* y;                           // (T, N), contiguous
  int64_t x_stride, up_stride, gate_stride, down_stride, h_stride, partial_stride;
  int32_t tokens, width, out_width, units, kept;  // T, D, N, F, K
  Dtype dtype;
  Act act;
  bool gated;  // by a matrix; its pointer may be null where there are no neurons or features
  MlpPlan plan;
};

// The fastest plan by counting, on an H200: a function of the sizes alone, and of whether there is a gate matrix.
MlpPlan gated_mlp_plan(int64_t tokens, int64_t width, int64_t out_width, int64_t kept, bool gated);

// Asynchronous on `stream` (a cudaStream_t) of `device`. Returns a cudaError_t. An idx outside [0, F) stops the kernel
// with a device-side assertion. Rows of x, up, gate or down that are not aligned to 16 bytes are copied value by value,
// in tiles of 32x64, whatever the plan says.
int gated_mlp_fused(const GatedMlp& job, int device, void* stream);

}  // namespace ppnet::cuda
