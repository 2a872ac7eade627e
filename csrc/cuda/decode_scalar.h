// gated_attention_decode with products of floats: float32 caches, and 16-bit ones that tensor cores cannot take.
#pragma once

#include "decode_positions.h"

namespace ppnet::cuda {

constexpr int kScalarRows = 4, kScalarPositions = 4;
// As many as registers allow.
template <int kMine>
constexpr int kScalarBlocksPerSm = kMine <= 4 ? 4 : 2;

// A warp has 4 positions at a time, of which every lane holds kSize consecutive dims of every 32 * kSize: 16 bytes, or
// one element where rows do not start at 16 bytes. Lane l's own pair of row and position is l / 8, l / 2 % 4.
template <class T, int kSize, int kPieces>
struct ScalarDecode {
  static constexpr int kMine = kSize * kPieces;  // dims of a lane
  using V = Pack<T, kSize>;

  const AttentionDecode& job;
  const DecodePart& part;
  const int lane;
  const DecodeRow row;
  const T *keys, *values;
  float query[kScalarRows][kMine], sum[kScalarRows][kMine];
  float key[kScalarPositions][kMine], value[kScalarPositions][kMine];
  float bias;     // of the lane's row and position
  unsigned seen;  // lanes that attend to their position
  Softmax softmax;

  __device__ ScalarDecode(const AttentionDecode& job, const DecodePart& part)
      : job(job), part(part), lane(threadIdx.x % 32), row(job, part, lane / 8) {
    keys = static_cast<const T*>(job.key) + part.b * job.key_stride[0] + part.head * job.key_stride[1];
    values = static_cast<const T*>(job.value) + part.b * job.value_stride[0] + part.head * job.value_stride[1];
    const T* queries = static_cast<const T*>(job.query) + part.b * job.query_stride[0];
#pragma unroll
    for (int r = 0; r < kScalarRows; ++r) {
      const int64_t at = part.first_row + (r < part.rows ? r : 0);
      const int64_t head = part.group * job.per_group + at / job.tokens;
      read(queries + head * job.query_stride[1] + at % job.tokens * job.query_stride[2], r < part.rows, query[r]);
#pragma unroll
      for (int d = 0; d < kMine; ++d) sum[r][d] = 0;
    }
  }

  __device__ int dim_of(int piece) const { return (32 * piece + lane) * kSize; }

  __device__ void read(const T* from, bool there, float* to) const {
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (there && dim_of(c) < job.width) {
        const V v = *reinterpret_cast<const V*>(from + dim_of(c));  // whole: one load
        v.widen(to + c * kSize);
      } else {
#pragma unroll
        for (int d = 0; d < kSize; ++d) to[c * kSize + d] = 0;
      }
    }
  }

  // The lanes that hold position p.
  __device__ static unsigned column(int p) { return 0x03030303u << 2 * p; }

  // Positions that no row attends to are not read: they may hold anything, and are zeros here.
  __device__ void fetch(int tile) {
    const bool plain = job.mask_kind == DecodeMask::none && tile >= part.common_begin &&
                       tile + kScalarPositions <= min(part.common_end, part.end);
    bias = plain ? 0.0f : row.bias(job, tile + lane / 2 % 4);
    seen = plain ? 0xffffffffu : __ballot_sync(0xffffffffu, bias != kNever);
#pragma unroll
    for (int p = 0; p < kScalarPositions; ++p)
      read(keys + (tile + p) * job.key_stride[2], (seen & column(p)) != 0, key[p]);
#pragma unroll
    for (int p = 0; p < kScalarPositions; ++p)
      read(values + (tile + p) * job.value_stride[2], (seen & column(p)) != 0, value[p]);
  }

  // The score of the lane's row and position.
  __device__ float score() const {
    float x[kScalarRows * kScalarPositions];
#pragma unroll
    for (int r = 0; r < kScalarRows; ++r)
#pragma unroll
      for (int p = 0; p < kScalarPositions; ++p) {
        float dot = 0;
#pragma unroll
        for (int d = 0; d < kMine; ++d) dot += query[r][d] * key[p][d];
        x[r * kScalarPositions + p] = dot;
      }
    // Every step adds the halves of the warp and gives each half of the sums to one of them: lane l ends with x[l / 2].
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int left = kScalarRows * kScalarPositions / 2 >> step;
      const bool upper = lane & 2 * left;
#pragma unroll
      for (int k = 0; k < kScalarRows * kScalarPositions / 2; ++k) {
        if (k >= left) continue;
        const float other = upper ? x[k] : x[k + left];
        x[k] = (upper ? x[k + left] : x[k]) + __shfl_xor_sync(0xffffffffu, other, 2 * left);
      }
    }
    return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
  }

  // The lane's score to its weight; the sums so far are scaled to the new largest score.
  __device__ float weigh(float score) {
    // A masked key may hold anything: its score is replaced, not added to.
    score = bias == kNever ? kNever : score * job.scale + bias;
    float top = fmaxf(score, __shfl_xor_sync(0xffffffffu, score, 2));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 4));
    const float before = softmax.most, factor = softmax.raise(top);
    if (__any_sync(0xffffffffu, softmax.most != before)) {
#pragma unroll
      for (int r = 0; r < kScalarRows; ++r) {
        const float of_row = __shfl_sync(0xffffffffu, factor, 8 * r);
#pragma unroll
        for (int d = 0; d < kMine; ++d) sum[r][d] *= of_row;
      }
    }
    const float weight = softmax.weight(score);
    softmax.weights = softmax.weights * factor + weight;
    return weight;
  }

  __device__ void add_values(float weight) {
#pragma unroll
    for (int r = 0; r < kScalarRows; ++r)
#pragma unroll
      for (int p = 0; p < kScalarPositions; ++p) {
        const float w = __shfl_sync(0xffffffffu, weight, 8 * r + 2 * p);
        // A masked value may hold anything: it is skipped and not multiplied by 0.
        if (seen >> (8 * r + 2 * p) & 1) {
#pragma unroll
          for (int d = 0; d < kMine; ++d) sum[r][d] += w * value[p][d];
        }
      }
  }

  template <int kDims>
  __device__ void hand_over(DecodeSums<kScalarRows, kDims>& sums, int warp) {
    softmax.weights += __shfl_xor_sync(0xffffffffu, softmax.weights, 2);
    softmax.weights += __shfl_xor_sync(0xffffffffu, softmax.weights, 4);
    if (lane % 8 == 0) {
      sums.most[warp][lane / 8] = softmax.final_most();
      sums.weights[warp][lane / 8] = softmax.weights;
    }
#pragma unroll
    for (int r = 0; r < kScalarRows; ++r)
#pragma unroll
      for (int c = 0; c < kPieces; ++c)
#pragma unroll
        for (int d = 0; d < kSize; ++d) sums.sum[warp][r][dim_of(c) + d] = sum[r][c * kSize + d];
  }
};

template <class T, int kSize, int kPieces>
__global__ void __launch_bounds__(kDecodeThreads, kScalarBlocksPerSm<kSize * kPieces>)
    decode_scalar_kernel(const __grid_constant__ AttentionDecode job, const __grid_constant__ DecodePlan plan) {
  const DecodePart part = part_of(job, plan, kScalarRows);
  auto& sums = *dynamic_shared<DecodeSums<kScalarRows, 32 * kSize * kPieces>>();
  const int warp = threadIdx.x / 32;
  ScalarDecode<T, kSize, kPieces> state(job, part);
  for (int tile = part.begin + warp * kScalarPositions; tile < part.end; tile += kDecodeWarps * kScalarPositions) {
    state.fetch(tile);
    state.add_values(state.weigh(state.score()));
  }
  state.hand_over(sums, warp);
  finish_part<T>(job, plan, part, sums);
}

}  // namespace ppnet::cuda
