// Parameters of linear_decode on the CPU. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include "cpu/tokens.h"

namespace ppnet {

// y = x W[idx]^T + bias[idx] (outputs are rows), or the partial sums of y = (x * gate) W[idx] (inputs are rows).
struct LinearDecode {
  Dtype dtype;         // of x, weight, bias and y: f32, bf16 or f16
  int64_t tokens;      // T, 1 .. kMostTokens
  int64_t kept;        // K rows
  int64_t width;       // elements of a row
  const char* weight;
  int64_t stride;      // bytes between rows
  const int64_t* idx;  // (K), or null: rows 0 .. K - 1
  const char* x;       // grouped tokens (group_tokens); inputs as rows: not used
  const float* factors;  // inputs as rows: (K, padded), the tokens times the gate (turn_tokens)
  const char* bias;    // one per row of the weight, or null; inputs as rows: not used
  char* y;             // (T, K); inputs as rows: not used
  float* partial;      // inputs as rows: (chunks, chunk_size(T, width)), in groups
  int64_t chunks;
};

// Outputs [begin, end).
PPNET_KERNEL(void linear_outputs(const LinearDecode& job, int64_t begin, int64_t end))
// Chunks [begin, end) of the kept rows.
PPNET_KERNEL(void linear_inputs(const LinearDecode& job, int64_t begin, int64_t end))

}  // namespace ppnet
