// gated_attention_decode on NVIDIA GPUs: hands the checked tensors to csrc/cuda/gated_attention_decode.cu.
#ifdef PPNET_WITH_CUDA

#include "cuda/gated_attention_decode.h"

#include <algorithm>

#include "cuda/rows.h"
#include "device.h"
#include "gated_attention_decode_check.h"
#include "operators.h"

namespace ppnet {
namespace {

cuda::AttentionDecode describe(const DecodeJob& job, int64_t kv_heads) {
  cuda::AttentionDecode to{};
  to.dtype = job.dtype;
  to.batch = job.batch, to.groups = job.groups, to.per_group = job.per_group;
  to.tokens = job.tokens, to.keys = job.keys, to.width = job.width;
  to.kv_heads = kv_heads;
  to.query = job.query, to.key = job.key, to.value = job.value;
  std::copy_n(job.query_stride, 3, to.query_stride);
  std::copy_n(job.key_stride, 3, to.key_stride);
  std::copy_n(job.value_stride, 3, to.value_stride);
  to.group = job.group;
  to.gate = job.gate;
  to.mask_kind = static_cast<cuda::DecodeMask>(job.mask_kind);  // the same names in the same order
  to.mask = job.mask;
  std::copy_n(job.mask_stride, 4, to.mask_stride);
  to.lengths = job.lengths;
  to.window = job.window;
  to.scale = job.scale;
  return to;
}
static_assert(static_cast<int>(MaskKind::f64) == static_cast<int>(cuda::DecodeMask::f64));

}  // namespace

Tensor gpu::gated_attention_decode(const char* op, Tensor query, const Tensor& key, const Tensor& value,
                                   Optional groups, Optional gate, const Optional& mask, Optional lengths,
                                   double scale, int64_t window) {
  const DecodeJob checked =
      check_gated_attention_decode(op, query, key, value, groups, gate, mask, lengths, scale, window, kGpuTensors);
  PPNET_CHECK(checked.width <= cuda::kDecodeWidth, op, ": query has a head dim of ", checked.width,
              "; on a GPU allowed are up to ", cuda::kDecodeWidth);
  const DeviceScope device(query);
  cuda::AttentionDecode job = describe(checked, key.size(1));
  const Tensor by_token = torch::stable::new_empty(query, {job.batch, job.tokens, query.size(1), job.width});
  const Tensor out = torch::stable::transpose(by_token, 1, 2);
  if (out.numel() == 0) return out;
  const Tensor partial = torch::stable::new_empty(query, {cuda::decode_plan(job).partial}, ScalarType::Float);
  job.out = by_token.mutable_data_ptr();
  job.partial = static_cast<float*>(partial.mutable_data_ptr());
  const int error = cuda::gated_attention_decode(job, device.index(), device.stream());
  PPNET_CHECK(error == 0, op, ": ", cuda::error_string(error));
  return out;
}

namespace {

Tensor gated_attention_decode_cuda(Tensor query, Tensor key, Tensor value, Optional groups, Optional gate,
                                   Optional mask, Optional lengths, double scale, int64_t window) {
  return gpu::gated_attention_decode("gated_attention_decode", query, key, value, groups, gate, mask, lengths, scale,
                                     window);
}

}  // namespace

PPNET_CUDA_OPERATORS(m) { m.impl("gated_attention_decode", TORCH_BOX(&gated_attention_decode_cuda)); }

}  // namespace ppnet

#endif
