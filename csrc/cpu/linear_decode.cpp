// linear_decode: bodies, compiled once per instruction set (PPNET_ISA).
#include "linear_decode.h"

#include "row_products.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

template <class W>
const W* row(const LinearDecode& job, int64_t k) {
  k = k < job.kept ? k : job.kept - 1;  // past the end, where rows are only prefetched
  return reinterpret_cast<const W*>(job.weight + (job.idx ? job.idx[k] : k) * job.stride);
}

// The rows of a block from k on, and those of the next block.
template <class W>
struct Block {
  Block(const LinearDecode& job, int64_t k, int64_t end)
      : count(static_cast<int>(end - k < kBlockRows ? end - k : kBlockRows)) {
    for (int r = 0; r < count; ++r) {
      rows[r] = row<W>(job, k + r);
      ahead[r] = reinterpret_cast<const char*>(row<W>(job, k + kBlockRows + r));
    }
  }
  int count;
  const W* rows[kBlockRows];
  const char* ahead[kBlockRows];
};

template <int T, class W>
void outputs(const LinearDecode& job, int64_t begin, int64_t end) {
  const auto* x = reinterpret_cast<const Factor<W>*>(job.x);
  const W* bias = reinterpret_cast<const W*>(job.bias);
  W* y = reinterpret_cast<W*>(job.y);
  for (int64_t k = begin; k < end; k += kBlockRows) {
    const Block<W> block(job, k, end);
    float out[kBlockRows * T];
    Ahead next{block.ahead, block.count, job.width * static_cast<int64_t>(sizeof(W))};
    dots<T>(block.rows, block.count, x, job.width, next, out);
    for (int r = 0; r < block.count; ++r) {
      const float offset = bias ? widen(bias[job.idx ? job.idx[k + r] : k + r]) : 0.0f;
      for (int t = 0; t < T && t < job.tokens; ++t) narrow(out[r * T + t] + offset, y[t * job.kept + k + r]);
    }
  }
}

template <int T, class W>
void inputs(const LinearDecode& job, int64_t begin, int64_t end) {
  const int64_t size = chunk_size(T, job.width);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* y = job.partial + chunk * size;
    memset(y, 0, static_cast<size_t>(size) * sizeof(float));
    const int64_t stop = chunk_start(job.kept, job.chunks, chunk + 1);
    for (int64_t k = chunk_start(job.kept, job.chunks, chunk); k < stop; k += kBlockRows) {
      const Block<W> block(job, k, stop);
      Ahead next{block.ahead, block.count, job.width * static_cast<int64_t>(sizeof(W))};
      sums<T>(block.rows, block.count, job.factors + k * T, y, job.width, next);
    }
  }
}

}  // namespace

void linear_outputs(const LinearDecode& job, int64_t begin, int64_t end) {
  with_kind(job.dtype, job.tokens, [&](auto kind) {
    using K = decltype(kind);
    outputs<K::kTokens, typename K::Element>(job, begin, end);
  });
}

void linear_inputs(const LinearDecode& job, int64_t begin, int64_t end) {
  with_kind(job.dtype, job.tokens, [&](auto kind) {
    using K = decltype(kind);
    inputs<K::kTokens, typename K::Element>(job, begin, end);
  });
}

}  // namespace PPNET_ISA
}  // namespace ppnet
