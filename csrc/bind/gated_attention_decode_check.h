// gated_attention_decode: arguments as checked by the binding, shared by the CPU and CUDA entries.
#pragma once

#include <optional>

#include "check.h"
#include "cpu/gated_attention_decode.h"

namespace ppnet {

using Optional = std::optional<Tensor>;

// All of a job that the arguments say; the values of groups and lengths are not looked at. What a kernel reads in order
// becomes contiguous in place. `cuda`: the tensors must be on a GPU.
DecodeJob check_gated_attention_decode(const char* op, Tensor& query, const Tensor& key, const Tensor& value,
                                       Optional& groups, Optional& gate, const Optional& mask, Optional& lengths,
                                       double scale, int64_t window, bool cuda);

}  // namespace ppnet
