// The few tokens of a decoding step, as the decode kernels read them: filled up to 1, 2, 4 or 8 rows, which are what the
// kernels are compiled for. Torch-free.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "isa.h"

namespace ppnet {

constexpr int64_t kMostTokens = 8;

// `static`: an inline function with external linkage would be shared between the instruction sets.
static inline int64_t padded_tokens(int64_t tokens) { return tokens <= 2 ? tokens : tokens <= 4 ? 4 : 8; }

// Chunks of the kept rows whose sums are added up at the end. They do not depend on the number of threads, so neither
// does the result. Adding up costs as much as reading one or two rows per chunk: 128 rows each, but up to 8 chunks of 32.
static inline int64_t decode_chunks(int64_t kept) {
  const int64_t wide = kept / 128, narrow = kept / 32 < 8 ? kept / 32 : 8;
  const int64_t chunks = wide > narrow ? wide : narrow;
  return chunks < 1 ? 1 : chunks > 32 ? 32 : chunks;
}
static inline int64_t chunk_start(int64_t kept, int64_t chunks, int64_t chunk) { return kept * chunk / chunks; }

// Elements from one token's row to the next in working memory: whole cache lines, and one more, or rows of a power of two
// would all fall into the same cache sets.
static inline int64_t token_stride(int64_t width) { return (width + 31) / 32 * 32 + 32; }

// wide[t][d] = x[t][d] * gate[d] (gate null: 1) for t < tokens, and zeros in the rows that fill up; x is contiguous, the
// rows of `wide` are token_stride(width) apart.
PPNET_KERNEL(void widen_tokens(Dtype dtype, const char* x, int64_t tokens, int64_t width, const float* gate, float* wide))
// y[t][d] = bias[d] (null: 0) + sum over chunks of partial[chunk][t][d], for columns [begin, end) and t < tokens; partial
// is (chunks, padded, token_stride(width)), y (tokens, width) of `dtype` as is the bias.
PPNET_KERNEL(void add_chunks(Dtype dtype, const float* partial, int64_t chunks, int64_t tokens, int64_t width,
                             const char* bias, char* y, int64_t begin, int64_t end))

}  // namespace ppnet
