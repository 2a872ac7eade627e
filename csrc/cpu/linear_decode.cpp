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
  Block(const LinearDecode& job, int64_t k, int64_t end) : count(static_cast<int>(end - k < kBlockRows ? end - k : kBlockRows)) {
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
  const Tokens<W> x{reinterpret_cast<const W*>(job.x), job.wide, token_stride(job.width)};
  const W* bias = reinterpret_cast<const W*>(job.bias);
  W* y = reinterpret_cast<W*>(job.y);
  for (int64_t k = begin; k < end; k += kBlockRows) {
    const Block<W> block(job, k, end);
    float out[kBlockRows * T];
    Ahead next{block.ahead, block.count, job.width * static_cast<int64_t>(sizeof(W))};
    dots<T, false>(block.rows, block.count, x, job.width, next, out);
    for (int r = 0; r < block.count; ++r) {
      const float offset = bias ? widen(bias[job.idx ? job.idx[k + r] : k + r]) : 0.0f;
      for (int t = 0; t < T && t < job.tokens; ++t) narrow(out[r * T + t] + offset, y[t * job.kept + k + r]);
    }
  }
}

template <int T, class W>
void inputs(const LinearDecode& job, int64_t begin, int64_t end) {
  const int64_t stride = token_stride(job.width), size = T * stride;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* y = job.partial + chunk * size;
    memset(y, 0, static_cast<size_t>(size) * sizeof(float));
    const int64_t stop = chunk_start(job.kept, job.chunks, chunk + 1);
    for (int64_t k = chunk_start(job.kept, job.chunks, chunk); k < stop; k += kBlockRows) {
      const Block<W> block(job, k, stop);
      float a[kBlockRows * T];
      for (int r = 0; r < block.count; ++r)
        for (int t = 0; t < T; ++t) a[r * T + t] = job.wide[t * token_stride(job.kept) + k + r];
      Ahead next{block.ahead, block.count, job.width * static_cast<int64_t>(sizeof(W))};
      sums<T, 1>(block.rows, block.count, a, y, stride, job.width, next);
    }
  }
}

template <class W>
void outputs(const LinearDecode& job, int64_t begin, int64_t end) {
  switch (padded_tokens(job.tokens)) {
    case 1: return outputs<1, W>(job, begin, end);
    case 2: return outputs<2, W>(job, begin, end);
    case 4: return outputs<4, W>(job, begin, end);
    default: return outputs<8, W>(job, begin, end);
  }
}

template <class W>
void inputs(const LinearDecode& job, int64_t begin, int64_t end) {
  switch (padded_tokens(job.tokens)) {
    case 1: return inputs<1, W>(job, begin, end);
    case 2: return inputs<2, W>(job, begin, end);
    case 4: return inputs<4, W>(job, begin, end);
    default: return inputs<8, W>(job, begin, end);
  }
}

}  // namespace

void linear_outputs(const LinearDecode& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case Dtype::bf16: return outputs<bf16_t>(job, begin, end);
    case Dtype::f16: return outputs<f16_t>(job, begin, end);
    default: return outputs<float>(job, begin, end);
  }
}

void linear_inputs(const LinearDecode& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case Dtype::bf16: return inputs<bf16_t>(job, begin, end);
    case Dtype::f16: return inputs<f16_t>(job, begin, end);
    default: return inputs<float>(job, begin, end);
  }
}

}  // namespace PPNET_ISA
}  // namespace ppnet
