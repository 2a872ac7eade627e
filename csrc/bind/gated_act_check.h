// gated_act and its backward: arguments as checked by the binding, shared by the CPU and CUDA entries.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/gated_act.h"

namespace ppnet {

std::vector<int64_t> sizes_of(const Tensor& t);

// A tensor (..., K) as the rows of a matrix.
struct ActRows {
  Tensor tensor;       // as given, or a contiguous copy where its rows are not evenly spaced or not contiguous
  int64_t stride = 0;  // bytes between rows
  const char* data() const { return static_cast<const char*>(tensor.const_data_ptr()); }
};

// A tensor of the shape, dtype and device of `up`.
ActRows matching_rows(const char* op, const char* name, const Tensor& t, const Tensor& up);

// Arguments that both directions have, checked and as rows. `cuda`: the tensors must be on a GPU.
struct ActInputs {
  ActRows up, gate;
  Tensor z;
  GatedActJob job{};
};
ActInputs check_gated_act(const char* op, const Tensor& up, const std::optional<Tensor>& gate,
                          const std::optional<Tensor>& z, const std::string& act, bool cuda);

}  // namespace ppnet
