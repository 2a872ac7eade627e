// gated_attention_decode: which positions of the cache a block's query rows attend to, and what its warps hand over.
#pragma once

#include "elements.h"
#include "gated_attention_decode.h"

namespace ppnet::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr float kNever = -INFINITY;  // the bias of a position that is not attended to

// The work of one block: positions [begin, end) of one KV group of one sequence, for up to kRows query rows.
struct DecodePart {
  int64_t b, group, head;        // head: of the cache
  int64_t first_row;             // row = query head within the group * T + token
  int rows;
  int split;
  int begin, end;
  int common_begin, common_end;  // what every row attends to, apart from the mask
};

struct Positions {
  int first, last;
};

// What token t may attend to, apart from the mask.
__device__ __forceinline__ Positions token_positions(const AttentionDecode& job, int64_t length, int64_t t) {
  const int64_t own = length - job.tokens + t;
  const int64_t last = job.mask_kind == DecodeMask::none ? own + 1 : length;
  const int64_t first = job.window > 0 && job.window <= own ? own + 1 - job.window : 0;
  return {static_cast<int>(first), static_cast<int>(last > 0 ? last : 0)};
}

__device__ __forceinline__ int64_t length_of(const AttentionDecode& job, int64_t b) {
  const int64_t length = job.lengths ? job.lengths[b] : job.keys;
  assert(length >= 0 && length <= job.keys && "gated_attention_decode: lengths out of range");
  return length;
}

// Blocks that read the same keys follow one another: the later ones find them in the L2 cache.
__device__ inline DecodePart part_of(const AttentionDecode& job, const DecodePlan& plan, int kRows) {
  DecodePart part;
  int64_t block = blockIdx.x;
  part.first_row = block % plan.row_tiles * kRows;
  block /= plan.row_tiles;
  part.split = static_cast<int>(block % plan.splits);
  block /= plan.splits;
  part.group = block % job.groups;
  part.b = block / job.groups;
  part.head = job.group ? job.group[part.group] : part.group;
  assert(part.head >= 0 && part.head < job.kv_heads && "gated_attention_decode: groups out of range");
  const int64_t left = job.per_group * job.tokens - part.first_row;
  part.rows = static_cast<int>(left < kRows ? left : kRows);
  // Both ends grow with the token.
  const int64_t length = length_of(job, part.b);
  const Positions oldest = token_positions(job, length, 0), newest = token_positions(job, length, job.tokens - 1);
  part.common_begin = newest.first;
  part.common_end = oldest.last;
  // Lengths are known here only: the attended positions are divided, so that a cache that is mostly empty keeps as many
  // blocks busy as a full one.
  constexpr int kGrain = 16;
  const int64_t all = newest.last > oldest.first ? newest.last - oldest.first : 0;
  const int64_t each = (all + plan.splits * kGrain - 1) / (plan.splits * kGrain) * kGrain;
  const int64_t begin = oldest.first + part.split * each;
  const int64_t end = begin + each < newest.last ? begin + each : newest.last;
  part.begin = static_cast<int>(begin < newest.last ? begin : newest.last);
  part.end = static_cast<int>(end);
  return part;
}

template <class M>
__device__ __forceinline__ float bias_from(const void* mask, int64_t at, arithmetic_t<M> lowest) {
  const arithmetic_t<M> x = widened(static_cast<const M*>(mask)[at]);
  // The lowest finite value masks as -infinity does: it is what transformers fills masks with.
  return x <= lowest ? kNever : static_cast<float>(x);
}

// One query row.
struct DecodeRow {
  Positions may;    // none beyond the block's rows
  int64_t mask_at;  // of the mask's position 0

  __device__ DecodeRow(const AttentionDecode& job, const DecodePart& part, int r) : may{0, 0}, mask_at(0) {
    if (r >= part.rows) return;
    const int64_t row = part.first_row + r, t = row % job.tokens;
    const int64_t head = part.group * job.per_group + row / job.tokens;
    may = token_positions(job, job.lengths ? job.lengths[part.b] : job.keys, t);
    if (may.last > part.end) may.last = part.end;
    mask_at = part.b * job.mask_stride[0] + head * job.mask_stride[1] + t * job.mask_stride[2];
  }

  // What is added to the score of a position; kNever: not attended to.
  __device__ float bias(const AttentionDecode& job, int position) const {
    if (position < may.first || position >= may.last) return kNever;
    const int64_t at = mask_at + position * job.mask_stride[3];
    switch (job.mask_kind) {
      case DecodeMask::none: return 0.0f;
      case DecodeMask::boolean: return static_cast<const uint8_t*>(job.mask)[at] ? 0.0f : kNever;
      case DecodeMask::f32: return bias_from<float>(job.mask, at, -0x1.fffffep127f);
      case DecodeMask::bf16: return bias_from<__nv_bfloat16>(job.mask, at, -0x1.fep127f);
      case DecodeMask::f16: return bias_from<__half>(job.mask, at, -65504.0f);
      case DecodeMask::f64: return bias_from<double>(job.mask, at, -0x1.fffffep127);
    }
    return 0.0f;
  }
};

// The running softmax of one row: its largest score and the sum of weights e^(score - largest).
struct Softmax {
  float most = kNever, weights = 0;

  // Takes the largest of the new scores; returns what older sums are to be multiplied with.
  __device__ float raise(float score) {
    const float before = most;
    most = fmaxf(most, score);  // NaN makes the weights NaN
    return before == kNever ? 0.0f : expf(before - most);
  }
  __device__ float weight(float score) const { return expf(score - (most == kNever ? 0.0f : most)); }
  // kNever where no position was attended to; NaN scores alone leave the weights NaN.
  __device__ float final_most() const { return weights == 0 ? kNever : most == kNever ? 0.0f : most; }
};

// What the warps of a block found, in its shared memory.
template <int kRows, int kDims>
struct DecodeSums {
  float sum[kDecodeWarps][kRows][kDims];
  float most[kDecodeWarps][kRows], weights[kDecodeWarps][kRows];
};

// Adds up the warps in their order and writes the result, or the part's share of it. All threads call it.
template <class T, int kRows, int kDims>
__device__ void finish_part(const AttentionDecode& job, const DecodePlan& plan, const DecodePart& part,
                            DecodeSums<kRows, kDims>& sums) {
  __shared__ float factor[kDecodeWarps][kRows];
  const int64_t rows = job.per_group * job.tokens;
  const int64_t unit = ((part.b * job.groups + part.group) * plan.splits + part.split) * rows + part.first_row;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < part.rows) {
    const int r = threadIdx.x;
    float top = kNever, weights = 0;
    for (int w = 0; w < kDecodeWarps; ++w) top = fmaxf(top, sums.most[w][r]);
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float most = sums.most[w][r];
      factor[w][r] = most == kNever ? 0.0f : expf(most - top);
      if (most != kNever) weights += factor[w][r] * sums.weights[w][r];
    }
    if (plan.splits == 1) {
      const float share = top == kNever ? 0.0f : (job.gate ? job.gate[part.group] : 1.0f) / weights;
      for (int w = 0; w < kDecodeWarps; ++w) factor[w][r] *= share;
    } else {
      const int64_t units = job.batch * job.groups * plan.splits * rows;
      job.partial[units * job.width + 2 * (unit + r)] = top;
      job.partial[units * job.width + 2 * (unit + r) + 1] = weights;
    }
  }
  __syncthreads();
  const int width = static_cast<int>(job.width);
  for (int i = threadIdx.x; i < part.rows * width; i += kDecodeThreads) {
    const int r = i / width, d = i % width;
    float total = 0;
    for (int w = 0; w < kDecodeWarps; ++w)
      if (sums.most[w][r] != kNever) total += factor[w][r] * sums.sum[w][r][d];
    if (plan.splits > 1) {
      job.partial[(unit + r) * job.width + d] = total;
    } else {
      const int64_t row = part.first_row + r, head = part.group * job.per_group + row / job.tokens;
      const int64_t token = part.b * job.tokens + row % job.tokens;
      static_cast<T*>(job.out)[(token * job.groups * job.per_group + head) * job.width + d] = rounded<T>(total);
    }
  }
}

}  // namespace ppnet::cuda
