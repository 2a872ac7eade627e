// Launchers of fused attention on NVIDIA GPUs. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include <cstdint>

#include "rows.h"

namespace ppnet::cuda {

enum class MaskKind : int32_t { none, boolean, f32, bf16, f16 };

// (B, heads, positions, width), its last axis contiguous, every row aligned to 16 bytes; strides are in elements.
struct Heads {
  void* data;
  int64_t batch, head, row;
};

// Query head h uses gate[k] and KV head groups[k] (k where groups is null) of k = h / per_group. Query t stands at
// position keys - tokens + t.
struct GatedAttention {
  Heads query, key, value, out;
  float* lse;             // (B, H, T): natural logarithm of the sum of exponentials, -inf where nothing is attended to
  const float* gate;      // (kept) or null
  const int64_t* groups;  // (kept) or null
  // Broadcast to (B, H, T, S); what is false, -inf or the lowest finite value is not attended to.
  const void* mask;
  int64_t mask_stride[4];
  // (B, S) or null: keys that are attended to; others are not read.
  const bool* used;
  int64_t used_stride[2];
  int64_t batch, heads, kv_heads, kept, per_group;  // heads = kept * per_group
  int32_t tokens, keys;                             // T, S < 2^30
  int32_t width;                                    // a multiple of 8 up to 256
  int32_t window;                                   // positions up to the query's own; 0: all
  float scale;
  bool is_causal;
  MaskKind mask_kind;
  Dtype dtype;  // bf16 or f16
};

// With dout and out as GatedAttention has them, and its lse.
struct GatedAttentionGradients {
  Heads dout, dquery, dkey, dvalue;
  float* rows;     // workspace, (2, B, H, T): logarithms to base 2, and rowsum(dout * out)
  float* partial;  // workspace, gated_attention_partials(p): the gate's gradient by block
  float* dgate;    // (kept); null, and partial too: it is not wanted
};

int64_t gated_attention_partials(const GatedAttention& p);

// Asynchronous on `stream` (a cudaStream_t) of `device`. They return a cudaError_t, also where there is no driver.
// A group outside [0, kv_heads) stops the kernel with a device-side assertion, as in torch.
int gated_attention(const GatedAttention& p, int device, void* stream);
int gated_attention_backward(const GatedAttention& p, const GatedAttentionGradients& g, int device, void* stream);

}  // namespace ppnet::cuda
