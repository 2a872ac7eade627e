// What the kernels of the decoding operators share: the choice of a kernel by dtype and tokens, rows by index, and the
// sum of partial sums.
#pragma once

#include "decode.h"
#include "vector.h"

namespace ppnet::cuda {

template <class E, int kTokensPadded>
struct Kind {
  using Element = E;
  static constexpr int kTokens = kTokensPadded;
};

// f(Kind<element, padded tokens>).
template <class E, class F>
auto with_tokens(int64_t tokens, F f) {
  switch (padded_tokens(tokens)) {
    case 1: return f(Kind<E, 1>{});
    case 2: return f(Kind<E, 2>{});
    case 4: return f(Kind<E, 4>{});
    default: return f(Kind<E, 8>{});
  }
}
template <class F>
auto with_kind(Dtype dtype, int64_t tokens, F f) {
  switch (dtype) {
    case Dtype::bf16: return with_tokens<__nv_bfloat16>(tokens, f);
    case Dtype::f16: return with_tokens<__half>(tokens, f);
    default: return with_tokens<float>(tokens, f);
  }
}

__device__ inline int64_t row_of(const int64_t* idx, int64_t k, int64_t rows) {
  const int64_t f = idx ? idx[k] : k;
  assert(f >= 0 && f < rows && "decode: idx out of range");
  return f;
}

// The chunk's kept rows: begin(chunk) .. begin(chunk + 1).
__host__ __device__ inline int64_t chunk_begin(int64_t kept, int64_t chunks, int64_t chunk) {
  return kept * chunk / chunks;
}

// y (tokens, width) = bias + residual (or 0) + the sum of partial (chunks, tokens, whole_pitch(width)), always added in
// the same order. Defined in decode_sums.cu.
cudaError_t add_up(Dtype dtype, const float* partial, int64_t chunks, int64_t tokens, int64_t width, const void* bias,
                   const void* residual, void* y, cudaStream_t stream);

}  // namespace ppnet::cuda
