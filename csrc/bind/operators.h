// The operators of a decoding step as functions, for the operators that are made of several of them: one call from
// Python and one look at the arguments, where every single operator has its own. `op` is what errors call the caller.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "decode_jobs.h"

namespace ppnet {
namespace decode {

using RmsNorm = Tensor(const char* op, const Tensor& x, const Tensor& weight, double eps, const char* weight_name);
using Linears = std::vector<Tensor>(const char* op, const Tensor& x, const std::vector<Tensor>& weight,
                                    std::vector<Optional>& bias, std::vector<Optional>& idx);
// Outputs are (B, T, H, Dh): transposed in ppnet/ops/rotary.py.
using Rotary = std::tuple<Tensor, Tensor>(const char* op, Tensor query, Tensor key, Tensor cos, Tensor sin);
using Attention = Tensor(const char* op, Tensor query, const Tensor& key, const Tensor& value, Optional groups,
                         Optional gate, const Optional& mask, Optional lengths, double scale, int64_t window);
// The residual, of the result's shape and dtype and contiguous, is added before the sum is rounded; null: 0.
using LinearT = Tensor(const char* op, const LinearNames& names, const Tensor& x, const Tensor& weight, Optional bias,
                       Optional idx, Optional z, const void* residual);
using Mlp = Tensor(const char* op, const Tensor& x, const Tensor& up, const Tensor& down, const Optional& gate,
                   Optional up_bias, Optional gate_bias, Optional down_bias, Optional idx, Optional z,
                   const std::string& act, const void* residual);

}  // namespace decode

namespace cpu {
decode::RmsNorm rms_norm;
decode::Linears linears_decode;
decode::Rotary rotary;
decode::Attention gated_attention_decode;
decode::LinearT linear_t_decode;
decode::Mlp gated_mlp_decode;
}  // namespace cpu

namespace gpu {
decode::RmsNorm rms_norm;
decode::Linears linears_decode;
decode::Rotary rotary;
decode::Attention gated_attention_decode;
decode::LinearT linear_t_decode;
decode::Mlp gated_mlp_decode;
}  // namespace gpu

}  // namespace ppnet
