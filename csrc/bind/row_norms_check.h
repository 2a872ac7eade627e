// row_norms and its gradient: arguments as checked by the binding, shared by the CPU and CUDA entries.
#pragma once

#include "check.h"
#include "rows.h"

namespace ppnet {

// One weight, and the arrays that its job points to.
struct NormItem {
  Matrix matrix;
  Tensor scale;
  bool scaled = false;
  int64_t features() const { return matrix.columns ? matrix.rows : matrix.cols; }
  int64_t units() const { return matrix.columns ? matrix.cols : matrix.rows; }
};

// `gpu`: the tensors must be on a GPU, else on the CPU.
std::vector<NormItem> check_row_norms(const char* op, const Tensors& weight, const Tensors& scale,
                                      const std::vector<int64_t>& dim, bool gpu);
// grad[i] and norm[i], contiguous in place.
void check_unit_gradient(const char* op, size_t i, const NormItem& item, Tensor& grad, Tensor& norm,
                         const Tensor& weight);
// The gradient of the matrix, not transposed back; empty where it is not needed.
Tensor new_weight_gradient(const NormItem& item, bool needed);

}  // namespace ppnet
