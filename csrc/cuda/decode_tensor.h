// gated_attention_decode on tensor cores, for 16-bit caches: 8 query rows and 16 positions at a time.
//
// Keys and values go from memory to registers in pieces of 16 bytes and from there to mma as they are: a product is a
// sum over dims, and the dims of one mma may be any, as long as both operands have the same. So the warp computes
// keys · queries^T (positions x rows) and values^T · weights^T (dims x rows), and neither needs shared memory.
// With g = lane / 4 and i = lane % 4 a lane holds
//   of the keys:    positions g and g + 8, dims 8i .. 8i + 7 of every 32
//   of the values:  positions 2i, 2i + 1, 2i + 8 and 2i + 9, dims 8g .. 8g + 7 of every 64
//   of the softmax: row g, at the positions of its values
//   of the sums:    rows 2i and 2i + 1, at the dims of its values
#pragma once

#include "decode_positions.h"
#include "prim.h"

namespace ppnet::cuda {

constexpr int kTensorRows = 8, kTensorPositions = 16;
constexpr unsigned kWholeWarp = 0xffffffffu;
// 8 KB of keys and values on their way per warp at 128 dims: two blocks of four warps cover memory's latency (about
// 30 KB per multiprocessor at 4.3 TB/s) twice. More would not leave the registers for it.
template <int kDims>
constexpr int kTensorBlocksPerSm = kDims <= 64 ? 3 : 2;
// With up to 128 dims the next tile's keys and values are fetched while this one's are used.
template <int kDims>
constexpr bool kFetchesAhead = kDims <= 128;

// What a tile's positions are to the lanes.
struct TileSeen {
  float bias[4];     // of the lane's row and positions; kNever: not attended to
  unsigned seen[4];  // lanes that attend to the e-th of their positions
};

template <int kDims>
struct TensorShared {
  DecodeSums<kTensorRows, kDims> sums;
  uint4 query[kDims / 32][32];  // as the lanes of every warp use it
};

template <class T, int kDims>
struct TensorDecode {
  static constexpr int kKeyPieces = kDims / 32, kValuePieces = kDims / 64;
  // Weights are split into parts whose sum has the 24 bits of a float: the product rounds the values no more.
  static constexpr int kParts = __is_same(T, __half) ? 2 : 3;

  const AttentionDecode& job;
  const DecodePart& part;
  const int g, i;
  const DecodeRow row;
  const T *keys, *values;
  const uint4 (*const query)[32];
  uint4 key[2][kKeyPieces], value[4][kValuePieces];
  float sum[kValuePieces][4][4];
  Softmax softmax;

  __device__ TensorDecode(const AttentionDecode& job, const DecodePart& part, TensorShared<kDims>& shared)
      : job(job), part(part), g(threadIdx.x % 32 / 4), i(threadIdx.x % 4), row(job, part, g), query(shared.query) {
    keys = static_cast<const T*>(job.key) + part.b * job.key_stride[0] + part.head * job.key_stride[1] + 8 * i;
    values = static_cast<const T*>(job.value) + part.b * job.value_stride[0] + part.head * job.value_stride[1] + 8 * g;
    const int64_t at = part.first_row + (g < part.rows ? g : 0);
    const int64_t head = part.group * job.per_group + at / job.tokens;
    const T* from = static_cast<const T*>(job.query) + part.b * job.query_stride[0] + head * job.query_stride[1] +
                    at % job.tokens * job.query_stride[2] + 8 * i;
    for (int c = threadIdx.x / 32; c < kKeyPieces; c += kDecodeWarps)
      shared.query[c][threadIdx.x % 32] = piece(from + 32 * c, g < part.rows && 32 * c + 8 * i < job.width);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kValuePieces; ++c)
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[c][t][e] = 0;
  }

  __device__ static uint4 piece(const T* p, bool there) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (there) v = __ldg(reinterpret_cast<const uint4*>(p));
    return v;
  }

  __device__ static int position_of(int i, int e) { return 2 * i + e % 2 + e / 2 * 8; }

  __device__ TileSeen see(int tile) const {
    TileSeen s;
    const bool plain = job.mask_kind == DecodeMask::none && tile >= part.common_begin &&
                       tile + kTensorPositions <= min(part.common_end, part.end);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s.bias[e] = plain ? 0.0f : row.bias(job, tile + position_of(i, e));
      s.seen[e] = plain ? kWholeWarp : __ballot_sync(kWholeWarp, s.bias[e] != kNever);
    }
    return s;
  }

  // The lanes that hold the same positions as lane group i.
  __device__ static unsigned column(int i) { return 0x11111111u << i; }

  // Positions that no row attends to are not read: they may hold anything, and are zeros here.
  __device__ void fetch_keys(const TileSeen& s, int tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool seen = ((g % 2 ? s.seen[2 * h + 1] : s.seen[2 * h]) & column(g / 2)) != 0;
      const T* from = keys + (tile + g + 8 * h) * job.key_stride[2];
#pragma unroll
      for (int c = 0; c < kKeyPieces; ++c) key[h][c] = piece(from + 32 * c, seen && 32 * c + 8 * i < job.width);
    }
  }
  __device__ void fetch_values(const TileSeen& s, int tile) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool seen = (s.seen[e] & column(i)) != 0;
      const T* from = values + (tile + position_of(i, e)) * job.value_stride[2];
#pragma unroll
      for (int c = 0; c < kValuePieces; ++c) value[e][c] = piece(from + 64 * c, seen && 64 * c + 8 * g < job.width);
    }
  }

  // score[e] of the lane's row and positions.
  __device__ void scores(float* score) const {
    float d[2][4] = {};
#pragma unroll
    for (int c = 0; c < kKeyPieces; ++c) {
      const uint4 a = key[0][c], b = key[1][c], q = query[c][threadIdx.x % 32];
      const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
      const uint32_t q_first[2] = {q.x, q.y}, q_second[2] = {q.z, q.w};
      mma_m16n8k16<T>(d[0], first, q_first);
      mma_m16n8k16<T>(d[1], second, q_second);
    }
    // Lane (g, i) has positions g and g + 8 of rows 2i and 2i + 1; it wants four positions of row g.
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int from = (2 * i + e % 2) * 4 + g / 2, at = e / 2 * 2;
      const float even = __shfl_sync(kWholeWarp, d[0][at] + d[1][at], from);
      const float odd = __shfl_sync(kWholeWarp, d[0][at + 1] + d[1][at + 1], from);
      score[e] = g % 2 ? odd : even;
    }
  }

  // Scores to weights; the sums so far are scaled to the new largest score.
  __device__ void weigh(const TileSeen& s, float* score) {
    float top = kNever;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // A masked key may hold anything: its score is replaced, not added to.
      score[e] = s.bias[e] == kNever ? kNever : score[e] * job.scale + s.bias[e];
      top = fmaxf(top, score[e]);
    }
    top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, 2));
    const float before = softmax.most, factor = softmax.raise(top);
    softmax.weights *= factor;
    if (__any_sync(kWholeWarp, softmax.most != before)) {
      const float even = __shfl_sync(kWholeWarp, factor, 8 * i), odd = __shfl_sync(kWholeWarp, factor, 8 * i + 4);
#pragma unroll
      for (int c = 0; c < kValuePieces; ++c)
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[c][t][e] *= e % 2 ? odd : even;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      score[e] = softmax.weight(score[e]);
      softmax.weights += score[e];
    }
  }

  // weight = the sum of the parts.
  __device__ static void split(const float* weight, uint32_t (*parts)[2]) {
    float rest[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) rest[e] = weight[e];
#pragma unroll
    for (int p = 0; p < kParts; ++p)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        parts[p][half] = pack<T>(rest[2 * half], rest[2 * half + 1]);
        const float2 taken = unpack<T>(parts[p][half]);
        rest[2 * half] -= taken.x;
        rest[2 * half + 1] -= taken.y;
      }
  }

  // The words of the lane's four positions that hold dims 2t and 2t + 1, as an operand of mma.
  __device__ static void pair_up(const uint32_t* word, uint32_t* a) {
    a[0] = __byte_perm(word[0], word[1], 0x5410);
    a[1] = __byte_perm(word[0], word[1], 0x7632);
    a[2] = __byte_perm(word[2], word[3], 0x5410);
    a[3] = __byte_perm(word[2], word[3], 0x7632);
  }
  __device__ static uint32_t word_of(const uint4& v, int t) { return t == 0 ? v.x : t == 1 ? v.y : t == 2 ? v.z : v.w; }

  __device__ void add_values(const TileSeen& s, const float* weight) {
    uint32_t parts[kParts][2];
    split(weight, parts);
    if (has_hidden_garbage(s)) return add_row_by_row(s, parts);
#pragma unroll
    for (int c = 0; c < kValuePieces; ++c)
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        uint32_t word[4], a[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) word[e] = word_of(value[e][c], t);
        pair_up(word, a);
#pragma unroll
        for (int p = 0; p < kParts; ++p) mma_m16n8k16<T>(sum[c][t], a, parts[p]);
      }
  }

  // Whether a position that some rows attend to and others do not holds infinity or NaN, which times 0 is NaN.
  __device__ bool has_hidden_garbage(const TileSeen& s) const {
    const unsigned rows = part.rows == kTensorRows ? kWholeWarp : (1u << 4 * part.rows) - 1;
    bool mixed[4], any = false;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const unsigned seen = s.seen[e] & column(i) & rows;
      mixed[e] = seen != 0 && seen != (column(i) & rows);
      any |= mixed[e];
    }
    if (!__any_sync(kWholeWarp, any)) return false;
    constexpr uint32_t kExponent = __is_same(T, __half) ? 0x7c00u : 0x7f80u;
    bool garbage = false;
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int c = 0; c < kValuePieces; ++c)
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const uint32_t word = word_of(value[e][c], t);
          garbage |= mixed[e] && ((word & kExponent) == kExponent || (word >> 16 & kExponent) == kExponent);
        }
    return __any_sync(kWholeWarp, garbage);
  }

  // Each row with the values it attends to alone. Rare, and as slow as it looks.
  __device__ void add_row_by_row(const TileSeen& s, const uint32_t (*parts)[2]) {
    unsigned mine = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) mine |= (s.bias[e] != kNever ? 1u : 0u) << e;
#pragma unroll 1
    for (int r = 0; r < part.rows; ++r) {
      const unsigned attends = __shfl_sync(kWholeWarp, mine, 4 * r + i);
#pragma unroll
      for (int c = 0; c < kValuePieces; ++c)
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          uint32_t word[4], a[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) word[e] = attends >> e & 1 ? word_of(value[e][c], t) : 0;
          pair_up(word, a);
          float d[4] = {};
#pragma unroll
          for (int p = 0; p < kParts; ++p) mma_m16n8k16<T>(d, a, parts[p]);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (2 * i + e % 2 == r) sum[c][t][e] += d[e];
        }
    }
  }

  __device__ void hand_over(DecodeSums<kTensorRows, kDims>& sums, int warp) {
    softmax.weights += __shfl_xor_sync(kWholeWarp, softmax.weights, 1);
    softmax.weights += __shfl_xor_sync(kWholeWarp, softmax.weights, 2);
    if (i == 0) {
      sums.most[warp][g] = softmax.final_most();
      sums.weights[warp][g] = softmax.weights;
    }
#pragma unroll
    for (int c = 0; c < kValuePieces; ++c)
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums.sum[warp][2 * i + e % 2][64 * c + 8 * g + 2 * t + e / 2] = sum[c][t][e];
  }
};

template <class T, int kDims>
__global__ void __launch_bounds__(kDecodeThreads, kTensorBlocksPerSm<kDims>)
    decode_tensor_kernel(const __grid_constant__ AttentionDecode job, const __grid_constant__ DecodePlan plan) {
  const DecodePart part = part_of(job, plan, kTensorRows);
  auto& shared = *dynamic_shared<TensorShared<kDims>>();
  const int warp = threadIdx.x / 32;
  TensorDecode<T, kDims> state(job, part, shared);
  constexpr int kStep = kDecodeWarps * kTensorPositions;
  int tile = part.begin + warp * kTensorPositions;
  TileSeen seen;
  if (tile < part.end) {
    seen = state.see(tile);
    state.fetch_keys(seen, tile);
    if (kFetchesAhead<kDims>) state.fetch_values(seen, tile);
  }
  for (; tile < part.end; tile += kStep) {
    const bool more = tile + kStep < part.end;
    TileSeen next = seen;
    float score[4];
    state.scores(score);
    if (!kFetchesAhead<kDims>) state.fetch_values(seen, tile);
    if (kFetchesAhead<kDims> && more) {
      next = state.see(tile + kStep);
      state.fetch_keys(next, tile + kStep);
    }
    state.weigh(seen, score);
    state.add_values(seen, score);
    if (!more) break;
    if (kFetchesAhead<kDims>) {
      state.fetch_values(next, tile + kStep);
    } else {
      next = state.see(tile + kStep);
      state.fetch_keys(next, tile + kStep);
    }
    seen = next;
  }
  state.hand_over(shared.sums, warp);
  finish_part<T>(job, plan, part, shared.sums);
}

}  // namespace ppnet::cuda
