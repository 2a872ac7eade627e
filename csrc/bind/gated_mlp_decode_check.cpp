// gated_mlp_decode: the arguments, checked.
#include "decode_jobs.h"

namespace ppnet {
namespace {

// A matrix of neurons: (F, D), rows contiguous.
const char* neurons(const char* op, const char* name, const Tensor& matrix, const Tensor& up, int64_t& stride) {
  check_rows(op, name, matrix, up);
  expect_shape(op, name, matrix, {up.size(0), up.size(1)}, "(F, D), as up");
  stride = matrix.stride(0) * element_size(dtype_of(matrix));
  return static_cast<const char*>(matrix.const_data_ptr());
}

}  // namespace

MlpDecode mlp_job(const char* op, const Tensor& x, const Tensor& up, const Tensor& down, const Optional& gate,
                  Optional& up_bias, Optional& gate_bias, Optional& down_bias, Optional& idx, Optional& z,
                  const std::string& act, bool gpu) {
  check_tokens(op, x, gpu);
  check_rows(op, "up", up, x);
  expect_shape(op, "x", x, {-1, up.size(1)}, "(T, D), D that of up");
  PPNET_CHECK(gate || !gate_bias, op, ": gate_bias is given, but gate is not");
  MlpDecode job{};
  job.dtype = dtype_of(x);
  job.act = act_named(op, act);
  job.tokens = x.size(0);
  job.width = up.size(1);
  job.up = neurons(op, "up", up, up, job.up_stride);
  job.down = neurons(op, "down", down, up, job.down_stride);
  if (gate) job.gate = neurons(op, "gate", *gate, up, job.gate_stride);
  job.up_bias = check_bias(op, "up_bias", up_bias, up.size(0), x);
  job.gate_bias = check_bias(op, "gate_bias", gate_bias, up.size(0), x);
  check_bias(op, "down_bias", down_bias, job.width, x);
  job.idx = check_idx(op, idx, up.size(0), x);
  job.kept = idx ? idx->size(0) : up.size(0);
  job.z = check_factors(op, "z", z, job.kept, x);
  return job;
}

}  // namespace ppnet
