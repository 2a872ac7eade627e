// gated_mlp_decode on the CPU: the schema is in ppnet/ops/gated_mlp_decode.py.
#include "cpu/gated_mlp_decode.h"

#include <torch/csrc/stable/library.h>

#include "operators.h"

namespace ppnet {
namespace {

// A matrix of neurons: (F, D), rows contiguous.
const char* neurons(const char* op, const char* name, const Tensor& matrix, const Tensor& up, int64_t& stride) {
  check_rows(op, name, matrix, up.scalar_type());
  expect_shape(op, name, matrix, {up.size(0), up.size(1)}, "(F, D), as up");
  stride = matrix.stride(0) * element_size(dtype_of(matrix));
  return static_cast<const char*>(matrix.const_data_ptr());
}

}  // namespace

Tensor cpu::gated_mlp_decode(const char* op, const Tensor& x, const Tensor& up, const Tensor& down,
                             const Optional& gate, Optional up_bias, Optional gate_bias, Optional down_bias,
                             Optional idx, Optional z, const std::string& act, const char* residual) {
  check_tokens(op, x);
  check_rows(op, "up", up, x.scalar_type());
  expect_shape(op, "x", x, {-1, up.size(1)}, "(T, D), D that of up");
  PPNET_CHECK(gate || !gate_bias, op, ": gate_bias is given, but gate is not");
  MlpDecode job{};
  job.dtype = dtype_of(x);
  job.act = act_named(op, act);
  job.tokens = x.size(0);
  job.width = up.size(1);
  job.up = neurons(op, "up", up, up, job.up_stride);
  job.down = neurons(op, "down", down, up, job.down_stride);
  if (gate) job.gate = neurons(op, "gate", *gate, up, job.gate_stride);
  job.up_bias = check_bias(op, "up_bias", up_bias, up.size(0), x.scalar_type());
  job.gate_bias = check_bias(op, "gate_bias", gate_bias, up.size(0), x.scalar_type());
  const char* down_bias_data = check_bias(op, "down_bias", down_bias, job.width, x.scalar_type());
  job.idx = check_idx(op, idx, up.size(0));
  job.kept = idx ? idx->size(0) : up.size(0);
  job.z = check_factors(op, "z", z, job.kept);
  Tensor y = torch::stable::new_empty(x, {job.tokens, job.width});
  if (job.tokens == 0 || job.width == 0) return y;
  job.chunks = decode_chunks(job.kept, job.tokens);
  const int64_t sums = job.chunks * chunk_size(job.tokens, job.width);
  Workspace workspace = Workspace::of_this_thread(grouped_bytes(x) + sums * 4);
  job.x = grouped(workspace, x);
  job.partial = workspace.take<float>(sums);
  const int64_t bytes = job.kept * job.width * element_size(job.dtype) * (gate ? 3 : 2);
  const auto kernel = PPNET_PICK(mlp_chunks);
  take_turns(job.chunks, threads_for(bytes), [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  add_up(job.partial, job.chunks, down_bias_data, residual, y);
  return y;
}

namespace {

Tensor gated_mlp_decode_cpu(Tensor x, Tensor up, Tensor down, Optional gate, Optional up_bias, Optional gate_bias,
                            Optional down_bias, Optional idx, Optional z, std::string act) {
  return cpu::gated_mlp_decode("gated_mlp_decode", x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) { m.impl("gated_mlp_decode", TORCH_BOX(&gated_mlp_decode_cpu)); }

}  // namespace ppnet
