// linear_decode, linears_decode and linear_t_decode on the CPU: the schemas are in ppnet/ops/linear{,s}_decode.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "operators.h"

namespace ppnet {
namespace {

constexpr int64_t kRows = 32;  // of a turn of linear_outputs: whole blocks

using Names = LinearNames;

int64_t weight_bytes(const LinearDecode& job) { return job.kept * job.width * element_size(job.dtype); }

int64_t turns(const LinearDecode& job) { return job.tokens ? (job.kept + kRows - 1) / kRows : 0; }

// All layers of the same tokens in one parallel pass: turns are numbered through.
void run_outputs(const Tensor& x, std::vector<LinearDecode>& jobs) {
  int64_t all = 0, bytes = 0;
  for (const LinearDecode& job : jobs) {
    all += turns(job);
    bytes += weight_bytes(job);
  }
  if (all == 0) return;
  Workspace workspace = Workspace::of_this_thread(grouped_bytes(x));
  const char* tokens = grouped(workspace, x);
  for (LinearDecode& job : jobs) job.x = tokens;
  const auto kernel = PPNET_PICK(linear_outputs);
  take_turns(all, threads_for(bytes), [&](int64_t begin, int64_t end) {
    for (const LinearDecode& job : jobs) {
      const int64_t own = turns(job), stop = std::min(end, own);
      if (begin < own) kernel(job, begin * kRows, std::min(stop * kRows, job.kept));
      begin = std::max<int64_t>(0, begin - own);
      end -= own;
      if (end <= 0) return;
    }
  });
}

Tensor linear_decode_cpu(Tensor x, Tensor weight, Optional bias, Optional idx) {
  const char* op = "linear_decode";
  check_tokens(op, x);
  std::vector<Tensor> y;
  std::vector<LinearDecode> jobs{output_job(op, x, weight, bias, idx, Names{}, y)};
  run_outputs(x, jobs);
  return y[0];
}

}  // namespace

std::vector<Tensor> cpu::linears_decode(const char* op, const Tensor& x, const std::vector<Tensor>& weight,
                                        std::vector<Optional>& bias, std::vector<Optional>& idx) {
  check_tokens(op, x);
  std::vector<Tensor> y;
  std::vector<LinearDecode> jobs = output_jobs(op, x, weight, bias, idx, y);
  run_outputs(x, jobs);
  return y;
}

Tensor cpu::linear_t_decode(const char* op, const Names& names, const Tensor& x, const Tensor& weight, Optional bias,
                            Optional idx, Optional z, const void* residual) {
  check_tokens(op, x);
  LinearDecode job = linear_job(op, x, weight, idx, names);
  expect_shape(op, "x", x, {-1, job.kept}, idx ? "(T, K), K the entries of idx" : "(T, F), F the rows of the weight");
  const char* bias_data = check_bias(op, names.bias.c_str(), bias, job.width, x);
  const float* factors = check_factors(op, names.z.c_str(), z, job.kept, x);
  Tensor y = torch::stable::new_empty(x, {job.tokens, job.width});
  if (job.tokens == 0 || job.width == 0) return y;
  job.chunks = decode_chunks(job.kept, job.tokens);
  const int64_t sums = job.chunks * chunk_size(job.tokens, job.width);
  Workspace workspace = Workspace::of_this_thread(turned_bytes(x) + sums * 4);
  job.factors = turned(workspace, x, factors);
  job.partial = workspace.take<float>(sums);
  const auto kernel = PPNET_PICK(linear_inputs);
  take_turns(job.chunks, threads_for(weight_bytes(job)), [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  add_up(job.partial, job.chunks, bias_data, residual, y);
  return y;
}

namespace {

std::vector<Tensor> linears_decode_cpu(Tensor x, std::vector<Tensor> weight, std::vector<Optional> bias,
                                       std::vector<Optional> idx) {
  return cpu::linears_decode("linears_decode", x, weight, bias, idx);
}

Tensor linear_t_decode_cpu(Tensor x, Tensor weight, Optional bias, Optional idx, Optional z) {
  return cpu::linear_t_decode("linear_t_decode", Names{}, x, weight, bias, idx, z, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) {
  m.impl("linear_decode", TORCH_BOX(&linear_decode_cpu));
  m.impl("linears_decode", TORCH_BOX(&linears_decode_cpu));
  m.impl("linear_t_decode", TORCH_BOX(&linear_t_decode_cpu));
}

}  // namespace ppnet
