// linear_decode and linear_t_decode on the CPU: the schemas are in ppnet/ops/linear_decode.py.
#include "cpu/linear_decode.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "decode.h"

namespace ppnet {
namespace {

LinearDecode make_job(const char* op, const Tensor& x, const Tensor& weight, Optional& idx) {
  check_tokens(op, x);
  check_rows(op, "weight", weight, x.scalar_type());
  LinearDecode job{};
  job.dtype = dtype_of(x);
  job.tokens = x.size(0);
  job.width = weight.size(1);
  job.weight = static_cast<const char*>(weight.const_data_ptr());
  job.stride = weight.stride(0) * element_size(job.dtype);
  job.idx = check_idx(op, idx, weight.size(0));
  job.kept = idx ? idx->size(0) : weight.size(0);
  return job;
}

int64_t weight_bytes(const LinearDecode& job) { return job.kept * job.width * element_size(job.dtype); }

Tensor linear_decode_cpu(Tensor x, Tensor weight, Optional bias, Optional idx) {
  const char* op = "linear_decode";
  LinearDecode job = make_job(op, x, weight, idx);
  expect_shape(op, "x", x, {-1, job.width}, "(T, D), D that of the weight");
  job.bias = check_bias(op, "bias", bias, weight.size(0), x.scalar_type());
  Tensor y = torch::stable::new_empty(x, {job.tokens, job.kept});
  if (job.tokens == 0 || job.kept == 0) return y;
  Workspace workspace = Workspace::of_this_thread(grouped_bytes(x));
  job.x = grouped(workspace, x);
  job.y = static_cast<char*>(y.mutable_data_ptr());
  const auto kernel = PPNET_PICK(linear_outputs);
  constexpr int64_t kRows = 32;  // whole blocks
  take_turns((job.kept + kRows - 1) / kRows, threads_for(weight_bytes(job)), [&](int64_t begin, int64_t end) {
    kernel(job, begin * kRows, std::min(end * kRows, job.kept));
  });
  return y;
}

Tensor linear_t_decode_cpu(Tensor x, Tensor weight, Optional bias, Optional idx, Optional z) {
  const char* op = "linear_t_decode";
  LinearDecode job = make_job(op, x, weight, idx);
  expect_shape(op, "x", x, {-1, job.kept}, idx ? "(T, K), K the entries of idx" : "(T, F), F the rows of the weight");
  const char* bias_data = check_bias(op, "bias", bias, job.width, x.scalar_type());
  const float* factors = check_factors(op, "z", z, job.kept);
  Tensor y = torch::stable::new_empty(x, {job.tokens, job.width});
  if (job.tokens == 0 || job.width == 0) return y;
  job.chunks = decode_chunks(job.kept, job.tokens);
  const int64_t sums = job.chunks * chunk_size(job.tokens, job.width);
  Workspace workspace = Workspace::of_this_thread(turned_bytes(x) + sums * 4);
  job.factors = turned(workspace, x, factors);
  job.partial = workspace.take<float>(sums);
  const auto kernel = PPNET_PICK(linear_inputs);
  take_turns(job.chunks, threads_for(weight_bytes(job)), [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  add_up(job.partial, job.chunks, bias_data, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) {
  m.impl("linear_decode", TORCH_BOX(&linear_decode_cpu));
  m.impl("linear_t_decode", TORCH_BOX(&linear_t_decode_cpu));
}

}  // namespace ppnet
