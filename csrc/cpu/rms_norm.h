// Parameters of rms_norm on the CPU. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include "cpu/dtype.h"
#include "isa.h"

namespace ppnet {

// y[r] = round(weight * round(x[r] / sqrt(mean(x[r]^2) + eps))), both roundings to `dtype` as in transformers' modules.
struct RmsNorm {
  Dtype dtype;  // f32, bf16 or f16
  int64_t width;
  const char* x;       // rows of `width`, as are those of y
  const char* weight;  // (width)
  float eps;
  char* y;
};

// Rows [begin, end).
PPNET_KERNEL(void rms_norm(const RmsNorm& job, int64_t begin, int64_t end))

}  // namespace ppnet
