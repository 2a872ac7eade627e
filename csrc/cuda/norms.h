// Launchers of rms_norm and rotary on NVIDIA GPUs. Torch-free. Strides are in elements.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace ppnet::cuda {

// y[r] = round(weight * round(x[r] / sqrt(mean(x[r]^2) + eps))), both roundings to `dtype`; x and y contiguous.
struct RmsNorm {
  Dtype dtype;
  int64_t rows, width;
  const void *x, *weight;
  float eps;
  void* y;
};

// One of query and key: heads (B, H, T, width) with contiguous rows, turned into y, laid out as (B, T, H, width).
struct RotaryHeads {
  const void* x;
  int64_t heads;
  int64_t batch_stride, head_stride, token_stride;
  void* y;
};

struct Rotary {
  Dtype dtype;
  int64_t batch, tokens, width;
  RotaryHeads query, key;
  const void *cos, *sin;       // (B or 1, T, width), contiguous
  int64_t angle_batch_stride;  // 0 where sequences share them
};

// Asynchronous on `stream` (a cudaStream_t) of `device`. They return a cudaError_t, also where there is no driver.
int rms_norm(const RmsNorm& job, int device, void* stream);
int rotary(const Rotary& job, int device, void* stream);

}  // namespace ppnet::cuda
