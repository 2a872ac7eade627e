// gated_act and gated_act_backward on NVIDIA GPUs: hands the checked tensors to csrc/cuda/gated_act.cu.
#ifdef PPNET_WITH_CUDA

#include "cuda/gated_act.h"

#include <tuple>

#include "cuda/rows.h"
#include "device.h"
#include "gated_act_check.h"
#include "rows.h"

namespace ppnet {
namespace {

cuda::GatedAct describe(const ActInputs& in) {
  const GatedActJob& job = in.job;
  const int64_t size = element_size(job.dtype);
  cuda::GatedAct to{};
  to.dtype = job.dtype;
  to.act = job.act;
  to.rows = job.rows;
  to.cols = job.cols;
  to.up = job.up;
  to.up_stride = job.up_stride / size;
  to.gate = job.gate;
  to.gate_stride = job.gate_stride / size;
  to.z = job.z;
  return to;
}

Tensor gated_act_cuda(Tensor up, std::optional<Tensor> gate, std::optional<Tensor> z, std::string act) {
  const char* op = "gated_act";
  const ActInputs in = check_gated_act(op, up, gate, z, act, kGpuTensors);
  const DeviceScope device(up);
  const Tensor h = torch::stable::new_empty(up, sizes_of(up));
  cuda::GatedAct job = describe(in);
  job.h = h.mutable_data_ptr();
  const int error = cuda::gated_act(job, device.index(), device.stream());
  PPNET_CHECK(error == 0, op, ": ", cuda::error_string(error));
  return h;
}

std::tuple<Tensor, Tensor, Tensor> gated_act_backward_cuda(Tensor dh, Tensor up, std::optional<Tensor> gate,
                                                           std::optional<Tensor> z, std::string act, bool need_up,
                                                           bool need_gate, bool need_z) {
  const char* op = "gated_act_backward";
  const ActInputs in = check_gated_act(op, up, gate, z, act, kGpuTensors);
  const ActRows gradient = matching_rows(op, "dh", dh, up);
  const DeviceScope device(up);
  need_gate = need_gate && gate;
  const std::vector<int64_t> full = sizes_of(up), none{0};
  const ScalarType sums = arithmetic(up.scalar_type());
  const Tensor dup = torch::stable::new_empty(up, need_up ? full : none);
  const Tensor dgate = torch::stable::new_empty(up, need_gate ? full : none);
  const Tensor dz = torch::stable::new_empty(up, {need_z ? in.job.cols : 0}, sums);
  if (!need_up && !need_gate && !need_z) return {dup, dgate, dz};
  cuda::GatedAct job = describe(in);
  job.dh = gradient.data();
  job.dh_stride = gradient.stride / element_size(job.dtype);
  job.dup = need_up ? dup.mutable_data_ptr() : nullptr;
  job.dgate = need_gate ? dgate.mutable_data_ptr() : nullptr;
  job.dz = need_z ? dz.mutable_data_ptr() : nullptr;
  const int64_t blocks = need_z ? cuda::gated_act_plan(job, true).row_blocks : 0;
  const Tensor partial = torch::stable::new_empty(up, {blocks * job.cols}, sums);
  job.partial = partial.mutable_data_ptr();
  const int error = cuda::gated_act_backward(job, device.index(), device.stream());
  PPNET_CHECK(error == 0, op, ": ", cuda::error_string(error));
  return {dup, dgate, dz};
}

}  // namespace

PPNET_CUDA_OPERATORS(m) {
  m.impl("gated_act", TORCH_BOX(&gated_act_cuda));
  m.impl("gated_act_backward", TORCH_BOX(&gated_act_backward_cuda));
}

}  // namespace ppnet

#endif
