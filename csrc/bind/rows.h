// Operators on rows: arguments as checked and oriented by the binding, shared by the CPU and CUDA entries.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

namespace ppnet {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// A matrix whose last axis is contiguous: the tensor itself, or its transpose where its first axis is contiguous.
struct Matrix {
  Tensor tensor;       // as given, or a contiguous copy where neither axis is contiguous
  bool transposed = false;  // the matrix is tensor.t()
  bool columns = false;     // the index runs along the contiguous axis
  int64_t rows = 0, cols = 0;  // a 1-D tensor is one row
  int64_t stride = 0;          // elements between rows
};

// Checks of lists of tensors. `at`: "src[3]", for messages; `absent`: the empty tensor that stands for none;
// `arithmetic`: the dtype of sums and factors.
std::string at(const char* list, size_t i);
bool absent(const Tensor& t);
torch::headeronly::ScalarType arithmetic(torch::headeronly::ScalarType dtype);
void check_lengths(const char* op, size_t n, const char* first,
                   std::initializer_list<std::pair<const char*, size_t>> lists);
void check_device(const char* op, const std::string& name, const Tensor& t, const Tensor& first);
void check_matrix(const char* op, const std::string& name, const Tensor& t, int64_t dim, size_t i);

// Whether the matrix of a 2-D tensor is its transpose: where only its first axis is contiguous.
bool prefers_transpose(const Tensor& t);
Matrix orient(const Tensor& t, int64_t dim, bool transposed);

// One list position of gather_rows (src is the full tensor) or scatter_rows (src is grad).
struct RowsItem {
  Matrix src;
  Tensor idx;           // (K) int64, contiguous
  const Tensor* scale = nullptr;  // (K), contiguous; null: none
  Matrix weight;        // scatter only
  bool has_weight = false;
  int64_t kept = 0, full = 0;  // K, F
  Tensor out, dot;
  bool writes_out = true;  // false where size is 0: only the dot is asked for
};

std::vector<RowsItem> gather_items(const Tensors& src, const Tensors& idx, Tensors& scale,
                                   const std::vector<int64_t>& dim, bool cuda);
std::vector<RowsItem> scatter_items(const Tensors& grad, const Tensors& idx, Tensors& scale,
                                    const std::vector<int64_t>& dim, const std::vector<int64_t>& size,
                                    const Tensors& weight, bool cuda);

}  // namespace ppnet
