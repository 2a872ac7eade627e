// gather_rows and scatter_rows on NVIDIA GPUs: hands the checked tensors to the launchers of csrc/cuda/rows.cu.
#ifdef PPNET_WITH_CUDA

#include "cuda/rows.h"

#include "check.h"
#include "device.h"
#include "rows.h"

namespace ppnet {
namespace {

using torch::headeronly::ScalarType;

cuda::Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return cuda::Dtype::bf16;
    case ScalarType::Half: return cuda::Dtype::f16;
    case ScalarType::Double: return cuda::Dtype::f64;
    default: return cuda::Dtype::f32;
  }
}

cuda::RowsTensor describe(const RowsItem& item, bool scatter) {
  cuda::RowsTensor t{};
  const int64_t n = scatter ? item.full : item.kept;
  t.src = item.src.tensor.const_data_ptr();
  t.out = item.writes_out ? item.out.mutable_data_ptr() : nullptr;
  t.idx = item.idx.const_data_ptr<int64_t>();
  t.scale = item.scale ? item.scale->const_data_ptr() : nullptr;
  t.columns = item.src.columns;
  t.rows = t.columns ? item.src.rows : n;
  t.cols = t.columns ? n : item.src.cols;
  t.src_stride = item.src.stride;
  t.kept = item.kept;
  t.full = item.full;
  t.dtype = dtype_of(item.src.tensor);
  if (item.has_weight) {
    t.weight = item.weight.tensor.const_data_ptr();
    t.weight_stride = item.weight.stride;
    t.dot = item.dot.mutable_data_ptr();
  }
  return t;
}

Tensors gather_rows_cuda(Tensors src, Tensors idx, Tensors scale, std::vector<int64_t> dim) {
  if (src.empty()) return {};
  const DeviceScope device(src[0]);
  std::vector<cuda::RowsTensor> tensors;
  Tensors out;
  const std::vector<RowsItem> items = gather_items(src, idx, scale, dim, kGpuTensors);
  for (const RowsItem& item : items) {
    tensors.push_back(describe(item, false));
    out.push_back(item.out);
  }
  const int error =
      cuda::gather_rows(tensors.data(), static_cast<int>(tensors.size()), device.index(), device.stream());
  PPNET_CHECK(error == 0, "gather_rows: ", cuda::error_string(error));
  return out;
}

std::tuple<Tensors, Tensors> scatter_rows_cuda(Tensors grad, Tensors idx, Tensors scale, std::vector<int64_t> dim,
                                               std::vector<int64_t> size, Tensors weight) {
  if (grad.empty()) return {};
  const DeviceScope device(grad[0]);
  std::vector<cuda::RowsTensor> tensors;
  Tensors out, dot;
  int64_t slot_count = 0;
  const std::vector<RowsItem> items = scatter_items(grad, idx, scale, dim, size, weight, kGpuTensors);
  for (const RowsItem& item : items) {
    tensors.push_back(describe(item, true));
    out.push_back(item.out);
    dot.push_back(item.dot);
    slot_count += item.full;
  }
  const Tensor slots = torch::stable::new_empty(idx[0], {slot_count}, ScalarType::Int);
  int32_t* next = slots.mutable_data_ptr<int32_t>();
  for (cuda::RowsTensor& t : tensors) {
    t.slot = next;
    next += t.full;
  }
  const int error = cuda::scatter_rows(tensors.data(), static_cast<int>(tensors.size()),
                                       slots.mutable_data_ptr<int32_t>(), slot_count, device.index(),
                                       device.stream());
  PPNET_CHECK(error == 0, "scatter_rows: ", cuda::error_string(error));
  return {out, dot};
}

}  // namespace

PPNET_CUDA_OPERATORS(m) {
  m.impl("gather_rows", TORCH_BOX(&gather_rows_cuda));
  m.impl("scatter_rows", TORCH_BOX(&scatter_rows_cuda));
}

}  // namespace ppnet

#endif
