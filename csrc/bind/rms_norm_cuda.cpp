// rms_norm on NVIDIA GPUs.
#ifdef PPNET_WITH_CUDA

#include "cuda/norms.h"
#include "cuda/rows.h"

#include "device.h"
#include "operators.h"

namespace ppnet {

Tensor gpu::rms_norm(const char* op, const Tensor& x, const Tensor& weight, double eps, const char* weight_name) {
  Tensor flat = x, scale = weight, y;
  int64_t rows = 0;
  const RmsNorm checked = rms_norm_job(op, flat, scale, eps, weight_name, kGpuTensors, rows, y);
  if (rows == 0 || checked.width == 0) return y;
  const DeviceScope device(x);
  const cuda::RmsNorm job{checked.dtype, rows, checked.width, checked.x, checked.weight, checked.eps, checked.y};
  const int error = cuda::rms_norm(job, device.index(), device.stream());
  PPNET_CHECK(error == 0, op, ": ", cuda::error_string(error));
  return y;
}

namespace {

Tensor rms_norm_cuda(Tensor x, Tensor weight, double eps) {
  return gpu::rms_norm("rms_norm", x, weight, eps, "weight");
}

}  // namespace

PPNET_CUDA_OPERATORS(m) { m.impl("rms_norm", TORCH_BOX(&rms_norm_cuda)); }

}  // namespace ppnet

#endif
