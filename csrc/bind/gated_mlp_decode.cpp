// gated_mlp_decode on the CPU: the schema is in ppnet/ops/gated_mlp_decode.py.
#include <torch/csrc/stable/library.h>

#include "operators.h"

namespace ppnet {

Tensor cpu::gated_mlp_decode(const char* op, const Tensor& x, const Tensor& up, const Tensor& down,
                             const Optional& gate, Optional up_bias, Optional gate_bias, Optional down_bias,
                             Optional idx, Optional z, const std::string& act, const void* residual) {
  MlpDecode job = mlp_job(op, x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act, false);
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
  const char* bias = down_bias ? static_cast<const char*>(down_bias->const_data_ptr()) : nullptr;
  add_up(job.partial, job.chunks, bias, residual, y);
  return y;
}

namespace {

Tensor gated_mlp_decode_cpu(Tensor x, Tensor up, Tensor down, Optional gate, Optional up_bias, Optional gate_bias,
                            Optional down_bias, Optional idx, Optional z, std::string act) {
  return cpu::gated_mlp_decode("gated_mlp_decode", x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act,
                               nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) { m.impl("gated_mlp_decode", TORCH_BOX(&gated_mlp_decode_cpu)); }

}  // namespace ppnet
