// The checked arguments of the decoding operators, for the CPU's and the GPU's bindings: a job holds what both need of
// them; pointers are those of the arguments, made contiguous in place where they must be.
#pragma once

#include <string>
#include <vector>

#include "cpu/gated_mlp_decode.h"
#include "cpu/linear_decode.h"
#include "cpu/rms_norm.h"
#include "cpu/rotary.h"
#include "decode.h"

namespace ppnet {

// What the arguments of a linear layer are called in errors.
struct LinearNames {
  std::string weight = "weight", bias = "bias", idx = "idx", z = "z";
};

// A layer without its tokens; x is checked already.
LinearDecode linear_job(const char* op, const Tensor& x, const Tensor& weight, Optional& idx,
                        const LinearNames& names);
// One whose rows are outputs, and its empty output, put at the end of y.
LinearDecode output_job(const char* op, const Tensor& x, const Tensor& weight, Optional& bias, Optional& idx,
                        const LinearNames& names, std::vector<Tensor>& y);
std::vector<LinearDecode> output_jobs(const char* op, const Tensor& x, const std::vector<Tensor>& weight,
                                      std::vector<Optional>& bias, std::vector<Optional>& idx, std::vector<Tensor>& y);

// An MLP without its tokens, x checked as well; down_bias is made contiguous.
MlpDecode mlp_job(const char* op, const Tensor& x, const Tensor& up, const Tensor& down, const Optional& gate,
                  Optional& up_bias, Optional& gate_bias, Optional& down_bias, Optional& idx, Optional& z,
                  const std::string& act, bool gpu);

// x and weight become contiguous; `rows` of x, and y its empty result.
RmsNorm rms_norm_job(const char* op, Tensor& x, Tensor& weight, double eps, const char* weight_name, bool gpu,
                     int64_t& rows, Tensor& y);

// query and key get contiguous rows, cos and sin become contiguous; y and z are their empty results, (B, T, H, Dh).
Rotary rotary_job(const char* op, Tensor& query, Tensor& key, Tensor& cos, Tensor& sin, bool gpu, Tensor& y, Tensor& z);

}  // namespace ppnet
