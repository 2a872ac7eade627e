// Parameters of gated_mlp_decode on the CPU. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include "cpu/act.h"
#include "cpu/tokens.h"

namespace ppnet {

// Partial sums of y = (z * act(x gate^T + gate_bias) * (x up^T + up_bias)) down over the kept neurons; without a gate,
// act is that of up. A neuron is a row of each of the three matrices.
struct MlpDecode {
  Dtype dtype;          // of everything but z: f32, bf16 or f16
  Act act;
  int64_t tokens;       // T, 1 .. kMostTokens
  int64_t kept;         // K neurons
  int64_t width;        // D
  const char *gate, *up, *down;  // rows of D elements; gate may be null
  int64_t gate_stride, up_stride, down_stride;  // bytes between rows
  const char *gate_bias, *up_bias;              // one per neuron of the matrices, or null
  const int64_t* idx;   // (K), or null: neurons 0 .. K - 1
  const float* z;       // (K), or null: 1
  const char* x;        // grouped tokens (group_tokens)
  float* partial;       // (chunks, chunk_size(T, D)), in groups
  int64_t chunks;
};

// Chunks [begin, end) of the kept neurons.
PPNET_KERNEL(void mlp_chunks(const MlpDecode& job, int64_t begin, int64_t end))

}  // namespace ppnet
