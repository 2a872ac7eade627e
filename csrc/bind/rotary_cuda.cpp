// rotary on NVIDIA GPUs.
#ifdef PPNET_WITH_CUDA

#include "cuda/norms.h"
#include "cuda/rows.h"

#include "device.h"
#include "operators.h"

namespace ppnet {
namespace {

cuda::RotaryHeads in_elements(const RotaryHeads& heads, int64_t bytes) {
  return {heads.x,  heads.heads, heads.batch_stride / bytes, heads.head_stride / bytes, heads.token_stride / bytes,
          heads.y};
}

}  // namespace

std::tuple<Tensor, Tensor> gpu::rotary(const char* op, Tensor query, Tensor key, Tensor cos, Tensor sin) {
  Tensor y, z;
  const Rotary checked = rotary_job(op, query, key, cos, sin, kGpuTensors, y, z);
  const int64_t batch = query.size(0), bytes = element_size(checked.dtype);
  if (batch * checked.tokens * checked.width == 0) return {y, z};
  const DeviceScope device(query);
  const cuda::Rotary job{checked.dtype,
                         batch,
                         checked.tokens,
                         checked.width,
                         in_elements(checked.query, bytes),
                         in_elements(checked.key, bytes),
                         checked.cos,
                         checked.sin,
                         checked.angle_batch_stride / bytes};
  const int error = cuda::rotary(job, device.index(), device.stream());
  PPNET_CHECK(error == 0, op, ": ", cuda::error_string(error));
  return {y, z};
}

namespace {

std::tuple<Tensor, Tensor> rotary_cuda(Tensor query, Tensor key, Tensor cos, Tensor sin) {
  return gpu::rotary("rotary", query, key, cos, sin);
}

}  // namespace

PPNET_CUDA_OPERATORS(m) { m.impl("rotary", TORCH_BOX(&rotary_cuda)); }

}  // namespace ppnet

#endif
