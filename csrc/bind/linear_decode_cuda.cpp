// linear_decode, linears_decode and linear_t_decode on NVIDIA GPUs.
#ifdef PPNET_WITH_CUDA

#include "cuda/decode.h"
#include "cuda/rows.h"

#include "device.h"
#include "operators.h"

namespace ppnet {
namespace {

void run_outputs(const char* op, const Tensor& x, const std::vector<Tensor>& weight,
                 const std::vector<LinearDecode>& jobs) {
  if (jobs.empty()) return;
  const DeviceScope device(x);
  const Tensor rows = torch::stable::contiguous(x);
  std::vector<cuda::DecodeLayer> layers;
  for (size_t i = 0; i < jobs.size(); ++i)
    layers.push_back({jobs[i].weight, weight[i].stride(0), jobs[i].idx, jobs[i].bias, jobs[i].y, jobs[i].kept,
                      weight[i].size(0)});
  const cuda::LinearsDecode all{jobs[0].dtype, jobs[0].tokens, jobs[0].width,
                                rows.const_data_ptr(), false, layers.data(), static_cast<int64_t>(layers.size())};
  const int error = cuda::linears_decode(all, device.index(), device.stream());
  PPNET_CHECK(error == 0, op, ": ", cuda::error_string(error));
}

Tensor linear_decode_cuda(Tensor x, Tensor weight, Optional bias, Optional idx) {
  const char* op = "linear_decode";
  check_tokens(op, x, kGpuTensors);
  std::vector<Tensor> y;
  const std::vector<LinearDecode> jobs{output_job(op, x, weight, bias, idx, LinearNames{}, y)};
  run_outputs(op, x, {weight}, jobs);
  return y[0];
}

std::vector<Tensor> linears_decode_cuda(Tensor x, std::vector<Tensor> weight, std::vector<Optional> bias,
                                        std::vector<Optional> idx) {
  return gpu::linears_decode("linears_decode", x, weight, bias, idx);
}

Tensor linear_t_decode_cuda(Tensor x, Tensor weight, Optional bias, Optional idx, Optional z) {
  return gpu::linear_t_decode("linear_t_decode", LinearNames{}, x, weight, bias, idx, z, nullptr);
}

}  // namespace

std::vector<Tensor> gpu::linears_decode(const char* op, const Tensor& x, const std::vector<Tensor>& weight,
                                        std::vector<Optional>& bias, std::vector<Optional>& idx) {
  check_tokens(op, x, kGpuTensors);
  std::vector<Tensor> y;
  const std::vector<LinearDecode> jobs = output_jobs(op, x, weight, bias, idx, y);
  run_outputs(op, x, weight, jobs);
  return y;
}

Tensor gpu::linear_t_decode(const char* op, const LinearNames& names, const Tensor& x, const Tensor& weight,
                            Optional bias, Optional idx, Optional z, const void* residual) {
  check_tokens(op, x, kGpuTensors);
  const LinearDecode checked = linear_job(op, x, weight, idx, names);
  expect_shape(op, "x", x, {-1, checked.kept},
               idx ? "(T, K), K the entries of idx" : "(T, F), F the rows of the weight");
  cuda::LinearTDecode job{};
  job.bias = check_bias(op, names.bias.c_str(), bias, checked.width, x);
  job.z = check_factors(op, names.z.c_str(), z, checked.kept, x);
  Tensor y = torch::stable::new_empty(x, {checked.tokens, checked.width});
  if (checked.tokens == 0 || checked.width == 0) return y;
  const DeviceScope device(x);
  const Tensor rows = torch::stable::contiguous(x);
  job.dtype = checked.dtype;
  job.tokens = checked.tokens;
  job.width = checked.width;
  job.kept = checked.kept;
  job.rows = weight.size(0);
  job.weight = checked.weight;
  job.stride = weight.stride(0);
  job.idx = checked.idx;
  job.x = rows.const_data_ptr();
  job.residual = residual;
  job.y = y.mutable_data_ptr();
  job.chunks = cuda::linear_t_chunks(job.dtype, job.tokens, job.width, job.kept);
  const Tensor partial =
      torch::stable::new_empty(x, {job.chunks, job.tokens, cuda::whole_pitch(job.width)}, ScalarType::Float);
  job.partial = partial.mutable_data_ptr<float>();
  const int error = cuda::linear_t_decode(job, device.index(), device.stream());
  PPNET_CHECK(error == 0, op, ": ", cuda::error_string(error));
  return y;
}

PPNET_CUDA_OPERATORS(m) {
  m.impl("linear_decode", TORCH_BOX(&linear_decode_cuda));
  m.impl("linears_decode", TORCH_BOX(&linears_decode_cuda));
  m.impl("linear_t_decode", TORCH_BOX(&linear_t_decode_cuda));
}

}  // namespace ppnet

#endif
