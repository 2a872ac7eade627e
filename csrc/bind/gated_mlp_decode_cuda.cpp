// gated_mlp_decode on NVIDIA GPUs.
#ifdef PPNET_WITH_CUDA

#include "cuda/decode.h"
#include "cuda/rows.h"

#include "device.h"
#include "operators.h"

namespace ppnet {

Tensor gpu::gated_mlp_decode(const char* op, const Tensor& x, const Tensor& up, const Tensor& down,
                             const Optional& gate, Optional up_bias, Optional gate_bias, Optional down_bias,
                             Optional idx, Optional z, const std::string& act, const void* residual) {
  const MlpDecode checked =
      mlp_job(op, x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act, kGpuTensors);
  Tensor y = torch::stable::new_empty(x, {checked.tokens, checked.width});
  if (checked.tokens == 0 || checked.width == 0) return y;
  const DeviceScope device(x);
  const Tensor rows = torch::stable::contiguous(x);
  cuda::MlpDecode job{};
  job.dtype = checked.dtype;
  job.act = checked.act;
  job.tokens = checked.tokens;
  job.width = checked.width;
  job.kept = checked.kept;
  job.rows = up.size(0);
  job.gate = checked.gate;
  job.up = checked.up;
  job.down = checked.down;
  job.gate_stride = gate ? gate->stride(0) : 0;
  job.up_stride = up.stride(0);
  job.down_stride = down.stride(0);
  job.gate_bias = checked.gate_bias;
  job.up_bias = checked.up_bias;
  job.down_bias = down_bias ? down_bias->const_data_ptr() : nullptr;
  job.residual = residual;
  job.idx = checked.idx;
  job.z = checked.z;
  job.x = rows.const_data_ptr();
  job.y = y.mutable_data_ptr();
  const Tensor partial = torch::stable::new_empty(x, {cuda::mlp_workspace(job)}, ScalarType::Float);
  job.partial = partial.mutable_data_ptr<float>();
  const int error = cuda::gated_mlp_decode(job, device.index(), device.stream());
  PPNET_CHECK(error == 0, op, ": ", cuda::error_string(error));
  return y;
}

namespace {

Tensor gated_mlp_decode_cuda(Tensor x, Tensor up, Tensor down, Optional gate, Optional up_bias, Optional gate_bias,
                             Optional down_bias, Optional idx, Optional z, std::string act) {
  return gpu::gated_mlp_decode("gated_mlp_decode", x, up, down, gate, up_bias, gate_bias, down_bias, idx, z, act,
                               nullptr);
}

}  // namespace

PPNET_CUDA_OPERATORS(m) { m.impl("gated_mlp_decode", TORCH_BOX(&gated_mlp_decode_cuda)); }

}  // namespace ppnet

#endif
