// Tokens of a decoding step: bodies, compiled once per instruction set (PPNET_ISA).
#include "tokens.h"

#include "row_products.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

inline int64_t clamp(int64_t n) { return n < 0 ? 0 : n < kLanes ? n : kLanes; }

template <class X, class W>
void group_all(const W* x, int64_t tokens, int64_t width, X* grouped) {
  const int64_t padded = padded_tokens(tokens);
  for (int64_t d = 0; d < width; d += kGroup)
    for (int64_t t = 0; t < padded; ++t)
      for (int64_t i = d; i < d + kGroup; i += kLanes, grouped += kLanes)
        store(grouped, t < tokens && i < width ? load(x + t * width + i, clamp(width - i)) : splat(0));
}

template <class W>
void turn_all(const W* x, int64_t tokens, int64_t kept, const float* gate, float* factors) {
  const int64_t padded = padded_tokens(tokens);
  for (int64_t k = 0; k < kept; ++k)
    for (int64_t t = 0; t < padded; ++t)
      *factors++ = t < tokens ? widen(x[t * kept + k]) * (gate ? gate[k] : 1.0f) : 0.0f;
}

template <class W>
void add_all(const float* partial, int64_t chunks, int64_t tokens, int64_t width, const W* bias, const W* residual,
             W* y, int64_t begin, int64_t end) {
  const int64_t padded = padded_tokens(tokens), size = chunk_size(tokens, width);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t d = begin; d < end; d += kLanes) {
      const int64_t n = clamp(end - d);
      const float* from = partial + grouped_at(d, padded) + t * kGroup;
      vfloat total = bias ? load(bias + d, n) : splat(0);
      if (residual) total = total + load(residual + t * width + d, n);
      for (int64_t c = 0; c < chunks; ++c) total = total + load(from + c * size, n);
      store(y + t * width + d, total, n);
    }
}

}  // namespace

void group_tokens(Dtype dtype, const char* x, int64_t tokens, int64_t width, char* grouped) {
  with_element(dtype, [&](auto kind) {
    using W = decltype(kind);
    group_all(reinterpret_cast<const W*>(x), tokens, width, reinterpret_cast<Factor<W>*>(grouped));
  });
}

void turn_tokens(Dtype dtype, const char* x, int64_t tokens, int64_t kept, const float* gate, float* factors) {
  with_element(dtype, [&](auto kind) {
    turn_all(reinterpret_cast<const decltype(kind)*>(x), tokens, kept, gate, factors);
  });
}

void add_chunks(Dtype dtype, const float* partial, int64_t chunks, int64_t tokens, int64_t width, const char* bias,
                const char* residual, char* y, int64_t begin, int64_t end) {
  with_element(dtype, [&](auto kind) {
    using W = decltype(kind);
    add_all(partial, chunks, tokens, width, reinterpret_cast<const W*>(bias), reinterpret_cast<const W*>(residual),
            reinterpret_cast<W*>(y), begin, end);
  });
}

}  // namespace PPNET_ISA
}  // namespace ppnet
