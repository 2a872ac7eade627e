// Checks of the operators on rows: every message names the argument, its position in the list and its value.
#include <string>

#include "check.h"
#include "rows.h"

namespace ppnet {

std::string at(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

bool absent(const Tensor& t) { return t.dim() == 1 && t.size(0) == 0; }

ScalarType arithmetic(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check_lengths(const char* op, size_t n, const char* first,
                   std::initializer_list<std::pair<const char*, size_t>> lists) {
  for (const auto& [name, length] : lists)
    PPNET_CHECK(length == n, op, ": ", name, " has ", length, " entries, but ", first, " has ", n,
                "; every list needs one entry per tensor");
}

void check_device(const char* op, const std::string& name, const Tensor& t, const Tensor& first) {
  PPNET_CHECK(t.is_cpu() == first.is_cpu() && t.get_device_index() == first.get_device_index(), op, ": ", name,
              " is on another device than the first tensor; all tensors of a call must be on one device");
}

void check_matrix(const char* op, const std::string& name, const Tensor& t, int64_t dim, size_t i) {
  PPNET_CHECK(t.dim() == 1 || t.dim() == 2, op, ": ", name, " has shape ", shape(t), "; allowed are 1-D and 2-D");
  PPNET_CHECK(dim >= 0 && dim < t.dim(), op, ": ", at("dim", i), " is ", dim, " for ", name, " of shape ", shape(t),
              "; allowed are 0 .. ", t.dim() - 1);
  check_floating(op, name, t);
}

static bool rows_contiguous(int64_t n0, int64_t n1, int64_t s0, int64_t s1) {
  return (s1 == 1 || n1 <= 1) && (s0 >= n1 || n0 <= 1);
}

static bool is_row_major(const Tensor& t) { return rows_contiguous(t.size(0), t.size(1), t.stride(0), t.stride(1)); }
static bool is_column_major(const Tensor& t) { return rows_contiguous(t.size(1), t.size(0), t.stride(1), t.stride(0)); }

bool prefers_transpose(const Tensor& t) { return t.dim() == 2 && !is_row_major(t) && is_column_major(t); }

Matrix orient(const Tensor& t, int64_t dim, bool transposed) {
  if (t.dim() == 1) {
    const Tensor row = t.is_contiguous() ? t : torch::stable::contiguous(t);
    return {row, false, true, 1, t.size(0), t.size(0)};
  }
  Tensor m = transposed ? torch::stable::transpose(t, 0, 1) : t;
  if (!is_row_major(m)) m = torch::stable::contiguous(m);
  const int64_t stride = m.size(0) > 1 ? m.stride(0) : m.size(1);
  return {m, transposed, (dim == 1) != transposed, m.size(0), m.size(1), stride};
}

namespace {

Tensor check_idx(const char* op, const Tensor& idx, size_t i, const Tensor& first) {
  PPNET_CHECK(idx.scalar_type() == ScalarType::Long, op, ": ", at("idx", i), " has dtype ",
              torch::headeronly::toString(idx.scalar_type()), "; it must be Long (int64)");
  PPNET_CHECK(idx.dim() == 1, op, ": ", at("idx", i), " has shape ", shape(idx), "; it must be (K,)");
  check_device(op, at("idx", i), idx, first);
  return idx.is_contiguous() ? idx : torch::stable::contiguous(idx);
}

// Makes scale[i] contiguous in place and returns it, or null where it is absent.
const Tensor* check_scale(const char* op, Tensor& scale, size_t i, int64_t kept, ScalarType dtype,
                          const Tensor& first) {
  if (absent(scale)) return nullptr;
  PPNET_CHECK(scale.dim() == 1 && scale.size(0) == kept, op, ": ", at("scale", i), " has shape ", shape(scale),
              "; it must be (K,) = (", kept, ",), or empty for no scale");
  PPNET_CHECK(scale.scalar_type() == arithmetic(dtype), op, ": ", at("scale", i), " has dtype ",
              torch::headeronly::toString(scale.scalar_type()), "; it must be ",
              torch::headeronly::toString(arithmetic(dtype)));
  check_device(op, at("scale", i), scale, first);
  if (!scale.is_contiguous()) scale = torch::stable::contiguous(scale);
  return &scale;
}

// A new tensor of the shape of `like` but n along the indexed axis; its memory order is that of the matrix `like`.
Tensor new_output(const Matrix& like, int64_t n) {
  if (like.tensor.dim() == 1) return torch::stable::new_empty(like.tensor, {n});
  const int64_t rows = like.columns ? like.rows : n, cols = like.columns ? n : like.cols;
  const Tensor out = torch::stable::new_empty(like.tensor, {rows, cols});
  return like.transposed ? torch::stable::transpose(out, 0, 1) : out;
}

}  // namespace

std::vector<RowsItem> gather_items(const Tensors& src, const Tensors& idx, Tensors& scale,
                                   const std::vector<int64_t>& dim, bool cuda) {
  const char* op = "gather_rows";
  check_lengths(op, src.size(), "src", {{"idx", idx.size()}, {"scale", scale.size()}, {"dim", dim.size()}});
  std::vector<RowsItem> items;
  items.reserve(src.size());
  for (size_t i = 0; i < src.size(); ++i) {
    PPNET_CHECK(src[i].is_cuda() == cuda, op, ": ", at("src", i), " is not on the device of this kernel");
    check_device(op, at("src", i), src[i], src[0]);
    check_matrix(op, at("src", i), src[i], dim[i], i);
    RowsItem item;
    item.idx = check_idx(op, idx[i], i, src[0]);
    item.kept = item.idx.size(0);
    item.full = src[i].size(dim[i]);
    item.scale = check_scale(op, scale[i], i, item.kept, src[i].scalar_type(), src[0]);
    item.src = orient(src[i], dim[i], prefers_transpose(src[i]));
    item.out = new_output(item.src, item.kept);
    items.push_back(std::move(item));
  }
  return items;
}

std::vector<RowsItem> scatter_items(const Tensors& grad, const Tensors& idx, Tensors& scale,
                                    const std::vector<int64_t>& dim, const std::vector<int64_t>& size,
                                    const Tensors& weight, bool cuda) {
  const char* op = "scatter_rows";
  check_lengths(op, grad.size(), "grad",
                {{"idx", idx.size()},
                 {"scale", scale.size()},
                 {"dim", dim.size()},
                 {"size", size.size()},
                 {"weight", weight.size()}});
  std::vector<RowsItem> items;
  items.reserve(grad.size());
  for (size_t i = 0; i < grad.size(); ++i) {
    PPNET_CHECK(grad[i].is_cuda() == cuda, op, ": ", at("grad", i), " is not on the device of this kernel");
    check_device(op, at("grad", i), grad[i], grad[0]);
    check_matrix(op, at("grad", i), grad[i], dim[i], i);
    RowsItem item;
    item.idx = check_idx(op, idx[i], i, grad[0]);
    item.kept = item.idx.size(0);
    PPNET_CHECK(grad[i].size(dim[i]) == item.kept, op, ": ", at("grad", i), " has size ", grad[i].size(dim[i]),
                " along dim ", dim[i], ", but ", at("idx", i), " has ", item.kept, " entries");
    item.scale = check_scale(op, scale[i], i, item.kept, grad[i].scalar_type(), grad[0]);
    item.has_weight = !absent(weight[i]);
    item.writes_out = size[i] > 0 || !item.has_weight;
    PPNET_CHECK(size[i] >= 0, op, ": ", at("size", i), " is ", size[i], "; it must not be negative");
    item.full = item.writes_out ? size[i] : weight[i].size(dim[i]);
    if (item.has_weight) {
      check_device(op, at("weight", i), weight[i], grad[0]);
      check_matrix(op, at("weight", i), weight[i], dim[i], i);
      PPNET_CHECK(weight[i].scalar_type() == grad[i].scalar_type(), op, ": ", at("weight", i), " has dtype ",
                  torch::headeronly::toString(weight[i].scalar_type()), ", but ", at("grad", i), " has ",
                  torch::headeronly::toString(grad[i].scalar_type()));
      bool same = weight[i].dim() == grad[i].dim();
      for (int64_t d = 0; same && d < grad[i].dim(); ++d)
        same = weight[i].size(d) == (d == dim[i] ? item.full : grad[i].size(d));
      PPNET_CHECK(same, op, ": ", at("weight", i), " has shape ", shape(weight[i]), "; it must be that of ",
                  at("grad", i), " = ", shape(grad[i]), " with ", item.full, " along dim ", dim[i]);
    }
    // The weight is the larger of the two: its memory order decides, so that the grad is the one to be copied.
    const bool transposed = prefers_transpose(item.has_weight ? weight[i] : grad[i]);
    item.src = orient(grad[i], dim[i], transposed);
    if (item.has_weight) item.weight = orient(weight[i], dim[i], transposed);
    item.out = new_output(item.src, item.writes_out ? item.full : 0);
    item.dot = torch::stable::new_empty(grad[i], {item.has_weight ? item.kept : 0}, arithmetic(grad[i].scalar_type()));
    items.push_back(std::move(item));
  }
  return items;
}

}  // namespace ppnet
