// row_norms and row_norms_backward on NVIDIA GPUs: hands the checked tensors to csrc/cuda/row_norms.cu.
#ifdef PPNET_WITH_CUDA

#include "cuda/row_norms.h"

#include "cuda/rows.h"
#include "device.h"
#include "row_norms_check.h"

namespace ppnet {
namespace {

cuda::RowNormsTensor describe(const NormItem& item) {
  cuda::RowNormsTensor t{};
  t.weight = item.matrix.tensor.const_data_ptr();
  t.rows = item.matrix.rows;
  t.cols = item.matrix.cols;
  t.stride = item.matrix.stride;
  t.dtype = dtype_of(item.matrix.tensor);
  t.columns = item.matrix.columns;
  t.scale = item.scaled ? item.scale.const_data_ptr() : nullptr;
  return t;
}

// Where the sums of columns are made over blocks of rows. `kept`: until the launch.
void take_partial(cuda::RowNormsTensor& t, const Tensor& weight, Tensors& kept) {
  kept.push_back(torch::stable::new_empty(weight, {cuda::norm_row_blocks(t) * t.cols},
                                          arithmetic(weight.scalar_type())));
  t.partial = kept.back().mutable_data_ptr();
}

Tensors row_norms_cuda(Tensors weight, Tensors scale, std::vector<int64_t> dim) {
  const char* op = "row_norms";
  const std::vector<NormItem> items = check_row_norms(op, weight, scale, dim, kGpuTensors);
  if (items.empty()) return {};
  const DeviceScope device(weight[0]);
  std::vector<cuda::RowNormsTensor> tensors;
  Tensors out, kept;
  for (size_t i = 0; i < items.size(); ++i) {
    out.push_back(torch::stable::new_empty(weight[i], {items[i].units()}, arithmetic(weight[i].scalar_type())));
    cuda::RowNormsTensor t = describe(items[i]);
    t.out = out[i].mutable_data_ptr();
    if (t.columns) take_partial(t, weight[i], kept);
    tensors.push_back(t);
  }
  const int error = cuda::row_norms(tensors.data(), static_cast<int>(tensors.size()), device.index(), device.stream());
  PPNET_CHECK(error == 0, op, ": ", cuda::error_string(error));
  return out;
}

std::tuple<Tensors, Tensors> row_norms_backward_cuda(Tensors grad, Tensors norm, Tensors weight, Tensors scale,
                                                     std::vector<int64_t> dim, bool needs_weight, bool needs_scale) {
  const char* op = "row_norms_backward";
  const std::vector<NormItem> items = check_row_norms(op, weight, scale, dim, kGpuTensors);
  check_lengths(op, weight.size(), "weight", {{"grad", grad.size()}, {"norm", norm.size()}});
  if (items.empty()) return {};
  const DeviceScope device(weight[0]);
  std::vector<cuda::RowNormsTensor> tensors;
  Tensors dweight, dscale, kept;
  for (size_t i = 0; i < items.size(); ++i) {
    const NormItem& item = items[i];
    const ScalarType sums = arithmetic(weight[i].scalar_type());
    check_unit_gradient(op, i, item, grad[i], norm[i], weight[i]);
    const bool with_scale = needs_scale && item.scaled;
    const Tensor dw = new_weight_gradient(item, needs_weight);
    dweight.push_back(needs_weight && item.matrix.transposed ? torch::stable::transpose(dw, 0, 1) : dw);
    dscale.push_back(torch::stable::new_empty(weight[i], {with_scale ? item.features() : 0}, sums));
    kept.push_back(torch::stable::new_empty(weight[i], {item.units()}, sums));
    cuda::RowNormsTensor t = describe(item);
    t.grad = grad[i].const_data_ptr();
    t.norm = norm[i].const_data_ptr();
    t.unit = kept.back().mutable_data_ptr();
    t.dweight = needs_weight ? dw.mutable_data_ptr() : nullptr;
    t.out = with_scale ? dscale[i].mutable_data_ptr() : nullptr;
    if (with_scale && !t.columns) take_partial(t, weight[i], kept);
    tensors.push_back(t);
  }
  const int error =
      cuda::row_norms_backward(tensors.data(), static_cast<int>(tensors.size()), device.index(), device.stream());
  PPNET_CHECK(error == 0, op, ": ", cuda::error_string(error));
  return {dweight, dscale};
}

}  // namespace

PPNET_CUDA_OPERATORS(m) {
  m.impl("row_norms", TORCH_BOX(&row_norms_cuda));
  m.impl("row_norms_backward", TORCH_BOX(&row_norms_backward_cuda));
}

}  // namespace ppnet

#endif
