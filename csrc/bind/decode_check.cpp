// Checks of the arguments of the decoding operators, for the CPU's and the GPU's bindings.
#include "decode.h"

namespace ppnet {
namespace {

void make_contiguous(Optional& t) {
  if (t && !t->is_contiguous()) t = torch::stable::contiguous(*t);
}

// Whether its values can be read here. The emulated kernels check indices themselves, as a GPU's do.
bool on_host(const Tensor& t) {
#ifdef PPNET_EMULATOR
  (void)t;
  return false;
#else
  return t.is_cpu();
#endif
}

}  // namespace

void check_rows(const char* op, const char* name, const Tensor& weight, const Tensor& x) {
  check_same_device(op, name, weight, x);
  check_dtype(op, name, weight, x.scalar_type(), "the dtype of x");
  PPNET_CHECK(weight.dim() == 2, op, ": ", name, " has shape ", shape(weight), "; it must have two axes");
  const bool rows = weight.size(1) <= 1 || weight.stride(1) == 1;
  PPNET_CHECK(rows && (weight.size(0) <= 1 || weight.stride(0) >= weight.size(1)), op, ": ", name, " of shape ",
              shape(weight), " has strides (", weight.stride(0), ", ", weight.stride(1),
              "); its rows must be contiguous: store it unit by unit (ppnet.accelerate does)");
}

const char* check_bias(const char* op, const char* name, Optional& bias, int64_t n, const Tensor& x) {
  if (!bias) return nullptr;
  check_same_device(op, name, *bias, x);
  check_dtype(op, name, *bias, x.scalar_type(), "the dtype of x");
  expect_shape(op, name, *bias, {n}, "one entry per output");
  make_contiguous(bias);
  return static_cast<const char*>(bias->const_data_ptr());
}

const int64_t* check_idx(const char* op, Optional& idx, int64_t n, const Tensor& x, const char* name) {
  if (!idx) return nullptr;
  check_same_device(op, name, *idx, x);
  check_dtype(op, name, *idx, ScalarType::Long, "indices are int64");
  expect_shape(op, name, *idx, {-1}, "(K,)");
  make_contiguous(idx);
  const int64_t* values = idx->const_data_ptr<int64_t>();
  if (!on_host(*idx)) return values;  // the kernels look
  for (int64_t k = 0, kept = idx->size(0); k < kept; ++k)
    PPNET_CHECK(values[k] >= 0 && values[k] < n, op, ": ", name, "[", k, "] is ", values[k],
                "; allowed are 0 .. ", n - 1);
  return values;
}

const float* check_factors(const char* op, const char* name, Optional& factors, int64_t kept, const Tensor& x) {
  if (!factors) return nullptr;
  check_same_device(op, name, *factors, x);
  check_dtype(op, name, *factors, ScalarType::Float, "gates are float32");
  expect_shape(op, name, *factors, {kept}, "(K,)");
  make_contiguous(factors);
  return factors->const_data_ptr<float>();
}

void check_tokens(const char* op, const Tensor& x, bool gpu) {
  check_kernel_device(op, "x", x, gpu);
  check_narrow(op, "x", x);
  PPNET_CHECK(x.dim() == 2 && x.size(0) <= kMostTokens, op, ": x has shape ", shape(x),
              "; it must be (T, width) with at most ", kMostTokens, " tokens");
}

}  // namespace ppnet
