// Parameters of gated_attention_decode on the CPU. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "isa.h"

namespace ppnet {

enum class MaskKind { none, boolean, f32, bf16, f16, f64 };

// Strides are in elements; the last axis of query, key, value and out is contiguous.
struct DecodeJob {
  Dtype dtype;  // of query, key, value and out: f32, bf16 or f16
  int64_t batch, groups, per_group, tokens, keys, width;  // B, G (used), H / G, T, S, Dh
  const char *query, *key, *value;
  int64_t query_stride[3];  // of b, h, t
  int64_t key_stride[3];    // of b, the KV head, s
  int64_t value_stride[3];
  const int64_t* group;    // (G) KV heads of the cache, or null: all
  const float* gate;       // (G), or null
  MaskKind mask_kind;
  const char* mask;
  int64_t mask_stride[4];  // of b, h, t, s; 0 where broadcast
  const int64_t* lengths;  // (B), or null: S
  int64_t window;          // 0: none
  float scale;
  char* out;               // (B, T, H, Dh) contiguous
  int64_t chunks;          // ceil(S / kDecodeChunk)
  float* partial;          // decode_partial_floats(job)
  int32_t* done;           // (B * G) zeroed: finished chunks
  int64_t threads;
  int32_t* next;           // (threads) the next unit of each thread's share: decode_share(job, thread) at first
};

// Positions of the cache per unit of work. Fixed, so that results do not depend on the number of threads.
constexpr int64_t kDecodeChunk = 512;
// Query rows (query head, token) that share the scores' scratch.
constexpr int64_t kDecodeRows = 32;

// Takes units (sequence, KV group, chunk) until none is left; whoever finishes a group's last chunk combines the group.
// Called for every thread, 0 <= thread < job.threads, with its own scratch, aligned to 64 bytes.
PPNET_KERNEL(void gated_attention_decode(const DecodeJob& job, int64_t thread, char* scratch))

// `static`: an inline function with external linkage would be shared between the instruction sets.
static inline int64_t decode_rows(const DecodeJob& job) { return job.per_group * job.tokens; }
static inline int64_t decode_units(const DecodeJob& job) { return job.batch * job.groups * job.chunks; }
// The first unit of a thread's share: a share's units mostly follow one another in memory.
static inline int64_t decode_share(const DecodeJob& job, int64_t thread) {
  return decode_units(job) * thread / job.threads;
}
// Dh rounded up to whole vectors of the widest instruction set.
static inline int64_t decode_padded_width(const DecodeJob& job) { return (job.width + 31) / 32 * 32; }
// For every unit and row: the weighted sum of values, the largest score and the sum of weights.
static inline int64_t decode_partial_floats(const DecodeJob& job) {
  return decode_units(job) * decode_rows(job) * (decode_padded_width(job) + 2);
}
static inline int64_t decode_scratch_bytes(const DecodeJob& job) {
  const int64_t rows = decode_rows(job);
  const int64_t mask_rows = job.mask_kind != MaskKind::none && job.mask_stride[1] != 0 ? rows : job.tokens;
  const int64_t queries = rows * decode_padded_width(job) * 4, scores = kDecodeRows * kDecodeChunk * 4;
  const int64_t bias = mask_rows * kDecodeChunk * 4, positions = kDecodeChunk * 8;
  return queries + scores + bias + positions + 4096;
}

}  // namespace ppnet
