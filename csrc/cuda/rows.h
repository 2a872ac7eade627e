// Launchers of gather_rows and scatter_rows on NVIDIA GPUs. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include <cstdint>

namespace ppnet::cuda {

enum class Dtype : int32_t { f32, bf16, f16, f64 };

// One tensor, in the orientation in which its last axis is contiguous; strides are in elements.
// The scale and the dot are float, or double for Dtype::f64.
struct RowsTensor {
  const void* src;  // gather: the full tensor; scatter: the gradient of the kept rows or columns
  void* out;        // contiguous; null: scatter computes only the dot
  const int64_t* idx;
  int32_t* slot;        // scatter: (F), -1 everywhere; the launcher writes the k of every kept position
  const void* scale;    // (K) or null
  const void* weight;   // scatter: the full tensor, or null
  void* dot;            // (K), with a weight
  int64_t rows, cols;   // of the output (of the full tensor where `out` is null)
  int64_t src_stride, weight_stride;
  int64_t kept, full;   // K, F
  Dtype dtype;
  bool columns;  // the index runs along the contiguous axis
};

// Asynchronous on `stream` (a cudaStream_t) of `device`. They return a cudaError_t, also where there is no driver.
// An idx outside [0, F), or repeated in a scatter, stops the kernel with a device-side assertion, as in torch.
int gather_rows(const RowsTensor* tensors, int n, int device, void* stream);
int scatter_rows(const RowsTensor* tensors, int n, int32_t* slots, int64_t slot_count, int device, void* stream);

// An error where the GPU, or the driver, has no code for it in these kernels. Makes the device's context.
int kernels_run(int device);

const char* error_string(int error);

}  // namespace ppnet::cuda
