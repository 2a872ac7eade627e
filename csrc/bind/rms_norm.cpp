// rms_norm on the CPU: the schema is in ppnet/ops/rms_norm.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "memory.h"
#include "operators.h"

namespace ppnet {

Tensor cpu::rms_norm(const char* op, const Tensor& x, const Tensor& weight, double eps, const char* weight_name) {
  Tensor flat = x, scale = weight, y;
  int64_t rows = 0;
  const RmsNorm job = rms_norm_job(op, flat, scale, eps, weight_name, false, rows, y);
  if (rows == 0 || job.width == 0) return y;
  const int64_t row_bytes = job.width * element_size(job.dtype);
  const auto kernel = PPNET_PICK(rms_norm);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kBytesPerThread / (2 * row_bytes)),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  return y;
}

namespace {

Tensor rms_norm_cpu(Tensor x, Tensor weight, double eps) { return cpu::rms_norm("rms_norm", x, weight, eps, "weight"); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu)); }

}  // namespace ppnet
