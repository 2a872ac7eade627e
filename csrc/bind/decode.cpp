#include "decode.h"

#include <algorithm>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace ppnet {
namespace {

struct Free {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

void make_contiguous(Optional& t) {
  if (t && !t->is_contiguous()) t = torch::stable::contiguous(*t);
}

}  // namespace

bool has_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t d = 0;
  for (int64_t size : sizes) {
    if (size >= 0 && t.size(d) != size) return false;
    ++d;
  }
  return true;
}

Workspace Workspace::of_this_thread(int64_t bytes) {
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  bytes += 4096;  // each piece is rounded up to a cache line
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})));
    size = bytes;
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(memory.get(), static_cast<size_t>(size));
#endif
  return Workspace(memory.get());
}

#if defined(__SANITIZE_ADDRESS__)
void Workspace::allow(void* taken, int64_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(taken, static_cast<size_t>(bytes));
}
#endif

void check_rows(const char* op, const char* name, const Tensor& weight, ScalarType dtype) {
  check_cpu(op, name, weight);
  check_dtype(op, name, weight, dtype, "the dtype of x");
  PPNET_CHECK(weight.dim() == 2, op, ": ", name, " has shape ", shape(weight), "; it must have two axes");
  const bool rows = weight.size(1) <= 1 || weight.stride(1) == 1;
  PPNET_CHECK(rows && (weight.size(0) <= 1 || weight.stride(0) >= weight.size(1)), op, ": ", name, " of shape ",
              shape(weight), " has strides (", weight.stride(0), ", ", weight.stride(1),
              "); its rows must be contiguous: store it unit by unit (ppnet.accelerate does)");
}

const char* check_bias(const char* op, const char* name, Optional& bias, int64_t n, ScalarType dtype) {
  if (!bias) return nullptr;
  check_cpu(op, name, *bias);
  check_dtype(op, name, *bias, dtype, "the dtype of x");
  expect_shape(op, name, *bias, {n}, "one entry per output");
  make_contiguous(bias);
  return static_cast<const char*>(bias->const_data_ptr());
}

const int64_t* check_idx(const char* op, Optional& idx, int64_t n, const char* name) {
  if (!idx) return nullptr;
  check_cpu(op, name, *idx);
  check_dtype(op, name, *idx, ScalarType::Long, "indices are int64");
  expect_shape(op, name, *idx, {-1}, "(K,)");
  make_contiguous(idx);
  const int64_t* values = idx->const_data_ptr<int64_t>();
  for (int64_t k = 0, kept = idx->size(0); k < kept; ++k)
    PPNET_CHECK(values[k] >= 0 && values[k] < n, op, ": ", name, "[", k, "] is ", values[k],
                "; allowed are 0 .. ", n - 1);
  return values;
}

const float* check_factors(const char* op, const char* name, Optional& factors, int64_t kept) {
  if (!factors) return nullptr;
  check_cpu(op, name, *factors);
  check_dtype(op, name, *factors, ScalarType::Float, "gates are float32");
  expect_shape(op, name, *factors, {kept}, "(K,)");
  make_contiguous(factors);
  return factors->const_data_ptr<float>();
}

void check_tokens(const char* op, const Tensor& x) {
  check_cpu(op, "x", x);
  check_narrow(op, "x", x);
  PPNET_CHECK(x.dim() == 2 && x.size(0) <= kMostTokens, op, ": x has shape ", shape(x),
              "; it must be (T, width) with at most ", kMostTokens, " tokens");
}

const char* grouped(Workspace& workspace, const Tensor& x) {
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  char* groups = workspace.take<char>(grouped_bytes(x));
  PPNET_PICK(group_tokens)
  (dtype_of(x), static_cast<const char*>(rows.const_data_ptr()), x.size(0), x.size(1), groups);
  return groups;
}

const float* turned(Workspace& workspace, const Tensor& x, const float* gate) {
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  float* factors = workspace.take<float>(padded_tokens(x.size(0)) * x.size(1));
  PPNET_PICK(turn_tokens)
  (dtype_of(x), static_cast<const char*>(rows.const_data_ptr()), x.size(0), x.size(1), gate, factors);
  return factors;
}

int64_t threads_for(int64_t bytes) {
  constexpr int64_t kBytesPerThread = 1 << 18;
  return std::clamp<int64_t>(bytes / kBytesPerThread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
}

void add_up(const float* partial, int64_t chunks, const char* bias, const char* residual, Tensor& y) {
  const int64_t tokens = y.size(0), width = y.size(1), groups = (width + kGroup - 1) / kGroup;
  const int64_t bytes = chunks * chunk_size(tokens, width) * static_cast<int64_t>(sizeof(float));
  const Dtype dtype = dtype_of(y);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const auto add = PPNET_PICK(add_chunks);
  share_out(groups, threads_for(bytes), [&](int64_t begin, int64_t end) {
    add(dtype, partial, chunks, tokens, width, bias, residual, out, begin * kGroup, std::min(end * kGroup, width));
  });
}

}  // namespace ppnet
