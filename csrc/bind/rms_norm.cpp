// rms_norm on the CPU: the schema is in ppnet/ops/rms_norm.py.
#include "cpu/rms_norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "memory.h"
#include "operators.h"

namespace ppnet {

Tensor cpu::rms_norm(const char* op, const Tensor& x, const Tensor& weight, double eps, const char* weight_name) {
  check_cpu(op, "x", x);
  check_narrow(op, "x", x);
  PPNET_CHECK(x.dim() >= 1, op, ": x has shape (); it must be (..., D)");
  RmsNorm job{};
  job.dtype = dtype_of(x);
  job.width = x.size(x.dim() - 1);
  check_cpu(op, weight_name, weight);
  expect_shape(op, weight_name, weight, {job.width}, "(D,), D that of x");
  check_dtype(op, weight_name, weight, x.scalar_type(), "that of x");
  std::vector<int64_t> sizes;
  int64_t rows = 1;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  const Tensor y = torch::stable::new_empty(x, sizes);
  if (rows == 0 || job.width == 0) return y;
  const Tensor flat = torch::stable::contiguous(x), scale = torch::stable::contiguous(weight);
  const int64_t row_bytes = job.width * element_size(job.dtype);
  job.x = static_cast<const char*>(flat.const_data_ptr());
  job.weight = static_cast<const char*>(scale.const_data_ptr());
  job.eps = static_cast<float>(eps);
  job.y = static_cast<char*>(y.mutable_data_ptr());
  const auto kernel = PPNET_PICK(rms_norm);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kBytesPerThread / (2 * row_bytes)),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  return y;
}

namespace {

Tensor rms_norm_cpu(Tensor x, Tensor weight, double eps) { return cpu::rms_norm("rms_norm", x, weight, eps); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu)); }

}  // namespace ppnet
