// The few tokens of a decoding step, as the decode kernels read them: filled up to 1, 2, 4 or 8, which are what the
// kernels are compiled for. Torch-free.
//
// Rows of a call's tokens (its input, its sums) lie side by side in groups of kGroup columns, all tokens of a group
// together: the kernels walk through them in one run, and rows of a power of two do not fall into the same cache sets.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "isa.h"

namespace ppnet {

constexpr int64_t kMostTokens = 8;
constexpr int64_t kGroup = 32;  // columns: whole vectors of every instruction set

// `static`: an inline function with external linkage would be shared between the instruction sets.
static inline int64_t padded_tokens(int64_t tokens) { return tokens <= 2 ? tokens : tokens <= 4 ? 4 : 8; }

// Chunks of the kept rows whose sums are added up at the end. They do not depend on the number of threads, so neither
// does the result. Adding up costs as much as reading one or two rows per chunk and token: at least 128 rows each, but
// up to 8 chunks of 32; above that a multiple of 8, which most numbers of threads share evenly.
static inline int64_t decode_chunks(int64_t kept, int64_t tokens) {
  const int64_t wide = kept / (tokens <= 2 ? 128 : 64 * padded_tokens(tokens)), narrow = kept / 32;
  if (wide >= 8) return wide > 32 ? 32 : wide / 8 * 8;
  return narrow < 1 ? 1 : narrow > 8 ? 8 : narrow;
}
static inline int64_t chunk_start(int64_t kept, int64_t chunks, int64_t chunk) { return kept * chunk / chunks; }

// Elements of the tokens' rows, grouped.
static inline int64_t grouped_size(int64_t tokens, int64_t width) {
  return padded_tokens(tokens) * ((width + kGroup - 1) / kGroup * kGroup);
}
// Floats of one chunk's sums: a little more than a power of two, see above.
static inline int64_t chunk_size(int64_t tokens, int64_t width) { return grouped_size(tokens, width) + kGroup; }

// x (tokens, width) of `dtype`, contiguous, in groups; zeros where tokens and columns are filled up. The elements are
// floats, or bf16 where the instruction set multiplies that: grouped_size(tokens, width) floats are room enough.
PPNET_KERNEL(void group_tokens(Dtype dtype, const char* x, int64_t tokens, int64_t width, char* grouped))
// factors[k][t] = x[t][k] * gate[k] (gate null: 1), (kept, padded): x (tokens, kept) of `dtype`, contiguous.
PPNET_KERNEL(void turn_tokens(Dtype dtype, const char* x, int64_t tokens, int64_t kept, const float* gate,
                              float* factors))
// y[t][d] = bias[d] + residual[t][d] (null: 0) + sum over chunks of partial[chunk][t][d], for columns [begin, end) and
// t < tokens; `begin` is a multiple of kGroup, partial is (chunks, chunk_size(tokens, width)) in groups, y and residual
// are (tokens, width) of `dtype`, as is the bias.
PPNET_KERNEL(void add_chunks(Dtype dtype, const float* partial, int64_t chunks, int64_t tokens, int64_t width,
                             const char* bias, const char* residual, char* y, int64_t begin, int64_t end))

}  // namespace ppnet
