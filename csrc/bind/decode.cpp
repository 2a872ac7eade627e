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

}  // namespace

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

void add_up(const float* partial, int64_t chunks, const char* bias, const void* residual, Tensor& y) {
  const int64_t tokens = y.size(0), width = y.size(1), groups = (width + kGroup - 1) / kGroup;
  const int64_t bytes = chunks * chunk_size(tokens, width) * static_cast<int64_t>(sizeof(float));
  const Dtype dtype = dtype_of(y);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const char* more = static_cast<const char*>(residual);
  const auto add = PPNET_PICK(add_chunks);
  share_out(groups, threads_for(bytes), [&](int64_t begin, int64_t end) {
    add(dtype, partial, chunks, tokens, width, bias, more, out, begin * kGroup, std::min(end * kGroup, width));
  });
}

}  // namespace ppnet
