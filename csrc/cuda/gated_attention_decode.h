// Launcher of gated_attention_decode on NVIDIA GPUs. Torch-free: the binding checks, allocates and fills this.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace ppnet::cuda {

enum class DecodeMask : int32_t { none, boolean, f32, bf16, f16, f64 };

// Strides are in elements; the last axis of query, key, value and out is contiguous.
struct AttentionDecode {
  ppnet::Dtype dtype;  // of query, key, value and out: f32, bf16 or f16
  int64_t batch, groups, per_group, tokens, keys, width;  // B, G (used), H / G, T, S, Dh
  int64_t kv_heads;        // of the cache
  const void *query, *key, *value;
  int64_t query_stride[3];  // of b, h, t
  int64_t key_stride[3];    // of b, the KV head, s
  int64_t value_stride[3];
  const int64_t* group;    // (G) KV heads of the cache, or null: all
  const float* gate;       // (G), or null
  DecodeMask mask_kind;
  const void* mask;
  int64_t mask_stride[4];  // of b, h, t, s; 0 where broadcast
  const int64_t* lengths;  // (B), or null: S
  int64_t window;          // 0: none
  float scale;
  void* out;               // (B, T, H, Dh) contiguous
  float* partial;          // decode_plan(job).partial floats
};

constexpr int64_t kDecodeWidth = 256;  // the widest head

// How a call is divided, from sizes, strides and the alignment of pointers alone.
struct DecodePlan {
  bool tensor_cores;  // 16-bit rows of whole 16-byte pieces; otherwise scalar products
  bool vectors;       // 16-byte loads
  int64_t row_tiles;  // tiles of query rows (query head of the group, token)
  int64_t splits;     // parts of the positions that a sequence attends to
  int64_t partial;    // floats of working memory; 0 where there is one part
};
DecodePlan decode_plan(const AttentionDecode& job);

// Asynchronous on `stream` (a cudaStream_t) of `device`; returns a cudaError_t, also where there is no driver. A group
// outside [0, kv_heads) or a length outside [0, S] stops the kernel with a device-side assertion.
int gated_attention_decode(const AttentionDecode& job, int device, void* stream);

}  // namespace ppnet::cuda
