// Tokens of a decoding step: bodies, compiled once per instruction set (PPNET_ISA).
#include "tokens.h"

#include "vec.h"

namespace ppnet {
namespace PPNET_ISA {
namespace {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class W>
void widen_all(const W* x, int64_t tokens, int64_t width, const float* gate, float* wide) {
  const int64_t stride = token_stride(width);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t n = min(kLanes, width - d);
      const vfloat value = load(x + t * width + d, n);
      store(wide + t * stride + d, gate ? value * load(gate + d, n) : value, n);
    }
  const int64_t rest = padded_tokens(tokens) - tokens;
  memset(wide + tokens * stride, 0, static_cast<size_t>(rest * stride) * sizeof(float));
}

template <class W>
void add_all(const float* partial, int64_t chunks, int64_t tokens, int64_t width, const W* bias, W* y, int64_t begin,
             int64_t end) {
  const int64_t rows = padded_tokens(tokens), stride = token_stride(width);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t d = begin; d < end; d += kLanes) {
      const int64_t n = min(kLanes, end - d);
      vfloat total = bias ? load(bias + d, n) : splat(0);
      for (int64_t c = 0; c < chunks; ++c) total = total + load(partial + (c * rows + t) * stride + d, n);
      store(y + t * width + d, total, n);
    }
}

}  // namespace

void widen_tokens(Dtype dtype, const char* x, int64_t tokens, int64_t width, const float* gate, float* wide) {
  switch (dtype) {
    case Dtype::bf16: return widen_all(reinterpret_cast<const bf16_t*>(x), tokens, width, gate, wide);
    case Dtype::f16: return widen_all(reinterpret_cast<const f16_t*>(x), tokens, width, gate, wide);
    default: return widen_all(reinterpret_cast<const float*>(x), tokens, width, gate, wide);
  }
}

void add_chunks(Dtype dtype, const float* partial, int64_t chunks, int64_t tokens, int64_t width, const char* bias,
                char* y, int64_t begin, int64_t end) {
  switch (dtype) {
    case Dtype::bf16:
      return add_all(partial, chunks, tokens, width, reinterpret_cast<const bf16_t*>(bias),
                     reinterpret_cast<bf16_t*>(y), begin, end);
    case Dtype::f16:
      return add_all(partial, chunks, tokens, width, reinterpret_cast<const f16_t*>(bias),
                     reinterpret_cast<f16_t*>(y), begin, end);
    default:
      return add_all(partial, chunks, tokens, width, reinterpret_cast<const float*>(bias),
                     reinterpret_cast<float*>(y), begin, end);
  }
}

}  // namespace PPNET_ISA
}  // namespace ppnet
