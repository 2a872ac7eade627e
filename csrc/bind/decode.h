// What the bindings of the decode operators share: checks of their arguments, working memory, shares of threads.
#pragma once

#include <atomic>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/tokens.h"

namespace ppnet {

using Optional = std::optional<Tensor>;

// Memory that the calling thread keeps between calls, so that a decoding step does not wait for fresh pages. It grows
// to what the largest call needed; the operators say how much that is.
class Workspace {
 public:
  // Room for a call, given up at the next one. Aligned to cache lines.
  static Workspace of_this_thread(int64_t bytes);
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    allow(taken, count * static_cast<int64_t>(sizeof(T)));
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }

 private:
  explicit Workspace(char* begin) : next_(begin) {}
  // Under AddressSanitizer nothing may be touched but what was taken in this call.
#if defined(__SANITIZE_ADDRESS__)
  static void allow(void* taken, int64_t bytes);
#else
  static void allow(void*, int64_t) {}
#endif
  char* next_;
};

// All are on the device of x.
// Dtype of x, and the last axis contiguous in rows that do not overlap.
void check_rows(const char* op, const char* name, const Tensor& weight, const Tensor& x);
// A bias (N,) of x's dtype, contiguous in place; null where absent.
const char* check_bias(const char* op, const char* name, Optional& bias, int64_t n, const Tensor& x);
// idx (K,) int64 in [0, n), contiguous in place; null where absent. On a GPU the kernels check the values.
const int64_t* check_idx(const char* op, Optional& idx, int64_t n, const Tensor& x, const char* name = "idx");
// Factors (K,) float32, contiguous in place; null where absent.
const float* check_factors(const char* op, const char* name, Optional& factors, int64_t kept, const Tensor& x);
// x: (T, width) with 0 <= T <= kMostTokens, f32, bf16 or f16; of a GPU, or of the CPU.
void check_tokens(const char* op, const Tensor& x, bool gpu = false);

// The tokens as the kernels read them, in working memory: x (T, width) in groups; (width, padded) factors, times the
// gate.
inline int64_t grouped_bytes(const Tensor& x) { return grouped_size(x.size(0), x.size(1)) * 4; }
const char* grouped(Workspace& workspace, const Tensor& x);
inline int64_t turned_bytes(const Tensor& x) { return padded_tokens(x.size(0)) * x.size(1) * 4; }
const float* turned(Workspace& workspace, const Tensor& x, const float* gate);

// Threads that are worth waking to read this many bytes.
int64_t threads_for(int64_t bytes);
// body(i, i + 1) for every i of [0, n) on that many threads. Each goes through a share of its own, in order, because
// kernels fetch ahead; then it helps the others: where another process holds a core, the rest go on.
template <class Body>
void take_turns(int64_t n, int64_t threads, const Body& body) {
  if (threads == 1) return body(0, n);
  std::vector<std::atomic<int64_t>> next(static_cast<size_t>(threads));
  for (int64_t t = 0; t < threads; ++t) next[static_cast<size_t>(t)] = n * t / threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t helped = 0; helped < threads; ++helped) {
        const int64_t share = (t + helped) % threads, end = n * (share + 1) / threads;
        for (int64_t i; (i = next[static_cast<size_t>(share)].fetch_add(1)) < end;) body(i, i + 1);
      }
  });
}
// body(begin, end) over equal shares of [0, n) on that many threads.
template <class Body>
void share_out(int64_t n, int64_t threads, const Body& body) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) body(n * t / threads, n * (t + 1) / threads);
  });
}

// y (T, width) = bias (width) + residual (T, width) (null: 0) + the sum over chunks of partial
// (chunks, chunk_size(T, width)).
void add_up(const float* partial, int64_t chunks, const char* bias, const void* residual, Tensor& y);

}  // namespace ppnet
