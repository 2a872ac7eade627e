// Checks of row_norms and its gradient: every message names the argument, its position in the list and its value.
#include "row_norms_check.h"

namespace ppnet {

std::vector<NormItem> check_row_norms(const char* op, const Tensors& weight, const Tensors& scale,
                                      const std::vector<int64_t>& dim, bool gpu) {
  check_lengths(op, weight.size(), "weight", {{"input_scale", scale.size()}, {"dim", dim.size()}});
  std::vector<NormItem> items;
  for (size_t i = 0; i < weight.size(); ++i) {
    if (i == 0) check_kernel_device(op, at("weight", i), weight[i], gpu);
    else check_same_device(op, at("weight", i), weight[i], weight[0]);
    check_matrix(op, at("weight", i), weight[i], dim[i], i);
    NormItem item;
    item.matrix = orient(weight[i], dim[i], prefers_transpose(weight[i]));
    const bool vector = weight[i].dim() == 1;
    // A scale of no features is no scale: the norms are 0 either way.
    item.scaled = !absent(scale[i]);
    if (item.scaled) {
      PPNET_CHECK(!vector, op, ": ", at("input_scale", i), " has shape ", shape(scale[i]), ", but ",
                  at("weight", i), " is 1-D and has no features to scale; it must be empty");
      check_same_device(op, at("input_scale", i), scale[i], weight[0]);
      check_shape(op, at("input_scale", i), scale[i], {item.features()}, "(D,), or empty for no scale,");
      check_dtype(op, at("input_scale", i), scale[i], arithmetic(weight[i].scalar_type()), "the dtype of the norms");
      item.scale = scale[i].is_contiguous() ? scale[i] : torch::stable::contiguous(scale[i]);
    }
    items.push_back(std::move(item));
  }
  return items;
}

void check_unit_gradient(const char* op, size_t i, const NormItem& item, Tensor& grad, Tensor& norm,
                         const Tensor& weight) {
  for (auto [name, t] : {std::pair{"grad", &grad}, std::pair{"norm", &norm}}) {
    check_same_device(op, at(name, i), *t, weight);
    check_shape(op, at(name, i), *t, {item.units()}, "that of the norms");
    check_dtype(op, at(name, i), *t, arithmetic(weight.scalar_type()), "the dtype of the norms");
    if (!t->is_contiguous()) *t = torch::stable::contiguous(*t);
  }
}

Tensor new_weight_gradient(const NormItem& item, bool needed) {
  const Tensor& weight = item.matrix.tensor;
  if (!needed) return torch::stable::new_empty(weight, {0});
  if (weight.dim() == 1) return torch::stable::new_empty(weight, {item.matrix.cols});
  return torch::stable::new_empty(weight, {item.matrix.rows, item.matrix.cols});
}

}  // namespace ppnet
