// The operators of a decoding step on a GPU as functions, for the operators that are made of several of them. `op` is
// what errors call the caller.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "decode_jobs.h"

namespace ppnet::gpu {

Tensor rms_norm(const char* op, const Tensor& x, const Tensor& weight, double eps, const char* weight_name = "weight");
std::vector<Tensor> linears_decode(const char* op, const Tensor& x, const std::vector<Tensor>& weight,
                                   std::vector<Optional>& bias, std::vector<Optional>& idx);
std::tuple<Tensor, Tensor> rotary(const char* op, Tensor query, Tensor key, Tensor cos, Tensor sin);
// The residual, of the result's shape and dtype and contiguous, is added before the sum is rounded; null: 0.
Tensor linear_t_decode(const char* op, const LinearNames& names, const Tensor& x, const Tensor& weight, Optional bias,
                       Optional idx, Optional z, const void* residual = nullptr);
Tensor gated_mlp_decode(const char* op, const Tensor& x, const Tensor& up, const Tensor& down, const Optional& gate,
                        Optional up_bias, Optional gate_bias, Optional down_bias, Optional idx, Optional z,
                        const std::string& act, const void* residual = nullptr);

}  // namespace ppnet::gpu
