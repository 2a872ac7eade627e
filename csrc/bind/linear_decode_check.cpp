// linear_decode, linears_decode and linear_t_decode: the arguments, checked.
#include "decode_jobs.h"

namespace ppnet {

LinearDecode linear_job(const char* op, const Tensor& x, const Tensor& weight, Optional& idx,
                        const LinearNames& names) {
  check_rows(op, names.weight.c_str(), weight, x);
  LinearDecode job{};
  job.dtype = dtype_of(x);
  job.tokens = x.size(0);
  job.width = weight.size(1);
  job.weight = static_cast<const char*>(weight.const_data_ptr());
  job.stride = weight.stride(0) * element_size(job.dtype);
  job.idx = check_idx(op, idx, weight.size(0), x, names.idx.c_str());
  job.kept = idx ? idx->size(0) : weight.size(0);
  return job;
}

LinearDecode output_job(const char* op, const Tensor& x, const Tensor& weight, Optional& bias, Optional& idx,
                        const LinearNames& names, std::vector<Tensor>& y) {
  LinearDecode job = linear_job(op, x, weight, idx, names);
  expect_shape(op, "x", x, {-1, job.width}, "(T, D), D that of the weight");
  job.bias = check_bias(op, names.bias.c_str(), bias, weight.size(0), x);
  y.push_back(torch::stable::new_empty(x, {job.tokens, job.kept}));
  job.y = static_cast<char*>(y.back().mutable_data_ptr());
  return job;
}

std::vector<LinearDecode> output_jobs(const char* op, const Tensor& x, const std::vector<Tensor>& weight,
                                      std::vector<Optional>& bias, std::vector<Optional>& idx,
                                      std::vector<Tensor>& y) {
  const size_t count = weight.size();
  PPNET_CHECK(bias.size() == count, op, ": bias has ", bias.size(), " entries, but weight has ", count);
  PPNET_CHECK(idx.size() == count, op, ": idx has ", idx.size(), " entries, but weight has ", count);
  std::vector<LinearDecode> jobs;
  for (size_t i = 0; i < count; ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    const LinearNames names{"weight" + at, "bias" + at, "idx" + at, "z" + at};
    jobs.push_back(output_job(op, x, weight[i], bias[i], idx[i], names, y));
  }
  return jobs;
}

}  // namespace ppnet
