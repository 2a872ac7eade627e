// rms_norm: the arguments, checked.
#include <vector>

#include "decode_jobs.h"

namespace ppnet {

RmsNorm rms_norm_job(const char* op, Tensor& x, Tensor& weight, double eps, const char* weight_name, bool gpu,
                     int64_t& rows, Tensor& y) {
  check_kernel_device(op, "x", x, gpu);
  check_narrow(op, "x", x);
  PPNET_CHECK(x.dim() >= 1, op, ": x has shape (); it must be (..., D)");
  RmsNorm job{};
  job.dtype = dtype_of(x);
  job.width = x.size(x.dim() - 1);
  check_same_device(op, weight_name, weight, x);
  expect_shape(op, weight_name, weight, {job.width}, "(D,), D that of x");
  check_dtype(op, weight_name, weight, x.scalar_type(), "that of x");
  std::vector<int64_t> sizes;
  rows = 1;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  y = torch::stable::new_empty(x, sizes);
  if (rows == 0 || job.width == 0) return job;
  x = torch::stable::contiguous(x);
  weight = torch::stable::contiguous(weight);
  job.x = static_cast<const char*>(x.const_data_ptr());
  job.weight = static_cast<const char*>(weight.const_data_ptr());
  job.eps = static_cast<float>(eps);
  job.y = static_cast<char*>(y.mutable_data_ptr());
  return job;
}

}  // namespace ppnet
