// Parameters of rotary on the CPU. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include "cpu/dtype.h"
#include "isa.h"

namespace ppnet {

// One of query and key: heads (B, H, T, width) with contiguous rows, turned into y, laid out as (B, T, H, width).
struct RotaryHeads {
  const char* x;
  int64_t heads;
  int64_t batch_stride, head_stride, token_stride;  // bytes
  char* y;
};

// y[d] = x[d] cos[d] - x[d + width/2] sin[d] in the first half of a row;
// y[d] = x[d] cos[d] + x[d - width/2] sin[d] in the second.
struct Rotary {
  Dtype dtype;  // of all: f32, bf16 or f16
  int64_t tokens, width;
  RotaryHeads query, key;
  const char *cos, *sin;                          // (B or 1, T, width)
  int64_t angle_batch_stride, angle_token_stride;  // bytes, of both; the first is 0 where sequences share them
};

// Tokens [begin, end) of B * T, all heads of both.
PPNET_KERNEL(void rotary(const Rotary& job, int64_t begin, int64_t end))

}  // namespace ppnet
