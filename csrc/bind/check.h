// Checks shared by the bindings. Every message names the operator, the argument, its value and what is allowed.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/act.h"
#include "cpu/dtype.h"

// STD_TORCH_CHECK, without the function, file and line of this library that it puts before the message.
#define PPNET_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::ppnet::fail(__VA_ARGS__); \
  } while (false)

namespace ppnet {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());  // RuntimeError in Python
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "(3, 4)", for messages.
inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

// The dtype of a tensor that passed check_floating.
inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: return Dtype::f32;
  }
}

inline void check_floating(const char* op, const std::string& name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  PPNET_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                  dtype == ScalarType::Double,
              op, ": ", name, " has dtype ", torch::headeronly::toString(dtype),
              "; allowed are Float, BFloat16, Half and Double");
}

// The dtypes of generation.
inline void check_narrow(const char* op, const std::string& name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  PPNET_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": ",
              name, " has dtype ", torch::headeronly::toString(dtype), "; allowed are Float, BFloat16 and Half");
}

inline void check_dtype(const char* op, const std::string& name, const Tensor& t, ScalarType expected,
                        const char* because) {
  PPNET_CHECK(t.scalar_type() == expected, op, ": ", name, " has dtype ",
              torch::headeronly::toString(t.scalar_type()), "; it must be ",
              torch::headeronly::toString(expected), " (", because, ")");
}

inline void check_cpu(const char* op, const std::string& name, const Tensor& t) {
  PPNET_CHECK(t.is_cpu(), op, ": ", name, " is not on the CPU; all tensors of a call must be on one device");
}

// The first tensor of a call: of a GPU where the kernel is a GPU's, else of the CPU.
inline void check_kernel_device(const char* op, const std::string& name, const Tensor& t, bool gpu) {
  if (!gpu) return check_cpu(op, name, t);
  PPNET_CHECK(t.is_cuda(), op, ": ", name, " is not on a GPU; all tensors of a call must be on one device");
}

// The others.
inline void check_same_device(const char* op, const std::string& name, const Tensor& t, const Tensor& first) {
  if (first.is_cpu()) return check_cpu(op, name, t);
  PPNET_CHECK(t.is_cuda() && t.get_device_index() == first.get_device_index(), op, ": ", name,
              " is on another device than the first tensor; all tensors of a call must be on one device");
}

// Sizes of -1 are free; `meaning` spells the shape in the field's letters, as "(T, D)".
inline void check_shape(const char* op, const std::string& name, const Tensor& t, std::initializer_list<int64_t> sizes,
                        const char* meaning) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  std::ostringstream expected;
  int64_t d = 0;
  for (int64_t size : sizes) {
    same = same && (size < 0 || t.size(d) == size);
    expected << (d ? ", " : "(");
    if (size < 0)
      expected << "any";
    else
      expected << size;
    ++d;
  }
  expected << (sizes.size() == 1 ? ",)" : ")");
  PPNET_CHECK(same, op, ": ", name, " has shape ", shape(t), "; it must be ", meaning, " = ", expected.str());
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t d = 0;
  for (int64_t size : sizes) {
    if (size >= 0 && t.size(d) != size) return false;
    ++d;
  }
  return true;
}

// check_shape builds its message first, which takes longer than a small layer: it is asked only to refuse.
inline void expect_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                         const char* meaning) {
  if (!has_shape(t, sizes)) check_shape(op, name, t, sizes, meaning);
}

inline Act act_named(const char* op, const std::string& name) {
  constexpr std::pair<const char*, Act> kActs[] = {{"silu", Act::silu},
                                                   {"gelu", Act::gelu},
                                                   {"gelu_tanh", Act::gelu_tanh},
                                                   {"relu", Act::relu},
                                                   {"relu2", Act::relu2}};
  for (const auto& [known, act] : kActs)
    if (name == known) return act;
  fail(op, ": act is \"", name, "\"; allowed are silu, gelu, gelu_tanh, relu and relu2");
}

}  // namespace ppnet
