// What the kernels of fused attention are made of: tiles in shared memory, products of tiles, which scores count.
//
// A block has four warps; a warp owns 16 kRowTiles rows of the scores. Scores, and sums over them, are accumulators of
// mma_m16n8k16: x[r][n][e] is row 16r + 8 (e / 2) + lane / 4 of the warp's, column 8n + 2 (lane % 4) + e % 2.
#pragma once

#include "gated_attention.h"
#include "prim.h"
#include "sizes.h"

namespace ppnet::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Elements from row to row of a tile: 16 bytes of padding bring the eight rows of an ldmatrix into different banks.
template <int kWidth>
constexpr int kStride = kWidth + 8;

// Starts to copy rows first .. first + kRows - 1; zeros stand for rows that `wanted` refuses and beyond `width`.
template <int kWidth, int kRows, class T, class Wanted>
__device__ __forceinline__ void load_rows(T* tile, const T* from, int64_t stride, int first, int width, Wanted wanted) {
  constexpr int kLanes = kWidth % 64 == 0 ? 8 : 4, kStep = kThreads / kLanes;  // of a row; rows at a time
  static_assert(kRows % kStep == 0 && kWidth % (8 * kLanes) == 0);
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
  const T* source = from + (first + row) * stride + 8 * lane;
  tile += row * kStride<kWidth> + 8 * lane;
#pragma unroll
  for (int step = 0; step < kRows; step += kStep) {
    const bool there = wanted(first + row + step);
#pragma unroll
    for (int c = 0; c < kWidth; c += 8 * kLanes) {
      const bool inside = there && c + 8 * lane < width;
      cp_async<16>(tile + step * kStride<kWidth> + c, inside ? source + c : from, inside ? 16 : 0);
    }
    source += kStep * stride;
  }
}

// Writes the first `rows` of a warp's 16 kRowTiles rows, from a tile of its own that it has filled.
template <int kWidth, int kRowTiles, class T>
__device__ __forceinline__ void store_rows(T* to, int64_t stride, const T* tile, int rows, int width) {
  constexpr int kChunks = kWidth / 8;
  __syncwarp();
#pragma unroll
  for (int step = 0; step < 16 * kRowTiles * kChunks / 32; ++step) {
    const int i = step * 32 + static_cast<int>(threadIdx.x) % 32, row = i / kChunks, column = i % kChunks * 8;
    if (row < rows && column < width)
      *reinterpret_cast<uint4*>(to + row * stride + column) =
          *reinterpret_cast<const uint4*>(tile + row * kStride<kWidth> + column);
  }
}

// Rounds a warp's sums, times the factor of their row, into its tile.
template <int kWidth, int kRowTiles, class T, class Factor>
__device__ __forceinline__ void round_rows(T* tile, const float (&sum)[kRowTiles][kWidth / 8][4], Factor factor) {
  const int lane = threadIdx.x % 32;
  T* to = tile + lane / 4 * kStride<kWidth> + lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float f = factor(r, half);
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        const uint32_t bits = pack<T>(sum[r][n][2 * half] * f, sum[r][n][2 * half + 1] * f);
        *reinterpret_cast<uint32_t*>(to + (16 * r + 8 * half) * kStride<kWidth> + 8 * n) = bits;
      }
    }
}

// d += a · bᵀ: the warp's rows of the tile a, with all of the tile b.
template <class T, int kWidth, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_rows(float (&d)[kRowTiles][kColumnTiles][4], const T* a, const T* b) {
  const int lane = threadIdx.x % 32;
  a += lane % 16 * kStride<kWidth> + lane / 16 * 8;
  b += (lane / 16 * 8 + lane % 8) * kStride<kWidth> + lane / 8 % 2 * 8;
  // Unrolled further, operands read ahead take the registers that sums of width 256 leave.
#pragma unroll(kWidth > 128 ? 4 : kWidth / 16)
  for (int k = 0; k < kWidth; k += 16) {
    uint32_t left[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) ldmatrix_x4(left[r], a + 16 * r * kStride<kWidth> + k);
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      uint32_t right[4];
      ldmatrix_x4(right, b + 8 * n * kStride<kWidth> + k);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        mma_m16n8k16<T>(d[r][n], left[r], right);
        mma_m16n8k16<T>(d[r][n + 1], left[r], right + 2);
      }
    }
  }
}

// d += w · b, with w in registers, packed: w[r][n] holds x[r][n] of accumulators, which are the operand of two tiles.
template <class T, int kWidth, int kRowTiles, int kInnerTiles>
__device__ __forceinline__ void multiply_columns(float (&d)[kRowTiles][kWidth / 8][4],
                                                 const uint32_t (&w)[kRowTiles][kInnerTiles][2], const T* b) {
  const int lane = threadIdx.x % 32;
  b += lane % 16 * kStride<kWidth> + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kInnerTiles; k += 2)
#pragma unroll
    for (int n = 0; n < kWidth / 8; n += 2) {
      uint32_t right[4];
      ldmatrix_x4_trans(right, b + 8 * k * kStride<kWidth> + 8 * n);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        mma_m16n8k16<T>(d[r][n], w[r][k], right);
        mma_m16n8k16<T>(d[r][n + 1], w[r][k], right + 2);
      }
    }
}

template <class T, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void pack_tiles(uint32_t (&w)[kRowTiles][kColumnTiles][2],
                                           const float (&x)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      w[r][n][0] = pack<T>(x[r][n][0], x[r][n][1]);
      w[r][n][1] = pack<T>(x[r][n][2], x[r][n][3]);
    }
}

// --- which keys a query attends to ----------------------------------------------------------------------------------

struct Span {
  int begin, end;
};

// Of the queries first .. last, those positions that the rules let one of them attend to.
__device__ __forceinline__ Span keys_of(const GatedAttention& p, int first, int last) {
  const int before = p.keys - p.tokens;
  return {p.window ? max(0, before + first - p.window + 1) : 0,
          p.is_causal ? min(p.keys, before + last + 1) : p.keys};
}

// Of the keys first .. last, those queries that the rules let attend to one of them.
__device__ __forceinline__ Span queries_of(const GatedAttention& p, int first, int last) {
  const int before = p.keys - p.tokens;
  return {p.is_causal ? max(0, first - before) : 0, p.window ? min(p.tokens, last + p.window - before) : p.tokens};
}

// Whether every query of a block attends to every key of another, as far as no mask is asked.
__device__ __forceinline__ bool whole(const GatedAttention& p, int t, int queries, int s, int keys) {
  const int before = p.keys - p.tokens;
  return t + queries <= p.tokens && s + keys <= p.keys && (!p.is_causal || s + keys - 1 <= before + t) &&
         (!p.window || s > before + t + queries - 1 - p.window);
}

// Whether key s counts at all. What does not is not read: it may be NaN.
template <bool kMasked>
__device__ __forceinline__ bool is_used(const GatedAttention& p, int64_t b, int s) {
  return !kMasked || !p.used || p.used[b * p.used_stride[0] + s * p.used_stride[1]];
}

// The mask's value in powers of 2.
__device__ __forceinline__ float mask_value(const GatedAttention& p, int64_t at) {
  float x, lowest;
  switch (p.mask_kind) {
    case MaskKind::boolean: return static_cast<const bool*>(p.mask)[at] ? 0.0f : -INFINITY;
    case MaskKind::bf16:
      x = __bfloat162float(static_cast<const __nv_bfloat16*>(p.mask)[at]);
      lowest = -3.3895313892515355e38f;
      break;
    case MaskKind::f16:
      x = __half2float(static_cast<const __half*>(p.mask)[at]);
      lowest = -65504.0f;
      break;
    default:
      x = static_cast<const float*>(p.mask)[at];
      lowest = -3.4028234663852886e38f;
  }
  return x <= lowest ? -INFINITY : x * kLog2e;
}

// Scores times the scale, in powers of 2: -inf where nothing is attended to. The warp's first row is `row`, its first
// column `column`: of queries and keys, or of keys and queries.
template <bool kRowsAreKeys, bool kMasked, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void apply_rules(float (&score)[kRowTiles][kColumnTiles][4], const GatedAttention& p,
                                            bool is_whole, int64_t b, int64_t h, int row, int column) {
  const float scale = p.scale * kLog2e;
  const int lane = threadIdx.x % 32;
  row += lane / 4;
  column += lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) score[r][n][e] *= scale;
  if (!is_whole) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int y = row + 16 * r + 8 * half;
        const Span span = kRowsAreKeys ? queries_of(p, y, y) : keys_of(p, y, y);
        const int begin = span.begin - column, end = span.end - column;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * n + e < begin || 8 * n + e >= end) score[r][n][2 * half + e] = -INFINITY;
      }
  }
  if constexpr (kMasked) {
    const int64_t mask = b * p.mask_stride[0] + h * p.mask_stride[1];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int y = row + 16 * r + e / 2 * 8, x = column + 8 * n + e % 2;
          const int t = kRowsAreKeys ? x : y, s = kRowsAreKeys ? y : x;
          if (t >= p.tokens || s >= p.keys) continue;
          float value = is_used<true>(p, b, s) ? 0 : -INFINITY;
          if (p.mask) value += mask_value(p, mask + t * p.mask_stride[2] + s * p.mask_stride[3]);
          // What is not attended to may be NaN.
          score[r][n][e] = value == -INFINITY ? value : score[r][n][e] + value;
        }
  }
}

// --- work -----------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T* rows_of(const Heads& t, int64_t b, int64_t head) {
  return static_cast<T*>(t.data) + b * t.batch + head * t.head;
}

__device__ __forceinline__ int64_t kv_head(const GatedAttention& p, int64_t k) {
  if (!p.groups) return k;
  const int64_t g = p.groups[k];
  assert(g >= 0 && g < p.kv_heads && "gated_attention: groups out of range");
  return g;
}

__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Launches `kernel` over `blocks`, which may be none.
template <class... Params, class... Args>
cudaError_t launch_blocks(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
                          const Args&... args) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(kernel, static_cast<unsigned>(blocks), threads, shared, stream, args...);
}

// What kernels are compiled for: the dtype, the width (the smallest that holds p's), whether there is a mask.
template <class Element, int width, bool masked>
struct Case {
  using T = Element;
  static constexpr int kWidth = width;
  static constexpr bool kMasked = masked;
};
template <class T, bool kMasked, class Run>
cudaError_t for_width(int width, Run run) {
  if (width <= 64) return run(Case<T, 64, kMasked>{});
  if (width <= 96) return run(Case<T, 96, kMasked>{});
  if (width <= 128) return run(Case<T, 128, kMasked>{});
  return run(Case<T, 256, kMasked>{});
}
// Calls run(Case{}).
template <class Run>
cudaError_t for_case(const GatedAttention& p, Run run) {
  const bool half = p.dtype == Dtype::f16;
  if (p.mask || p.used)
    return half ? for_width<__half, true>(p.width, run) : for_width<__nv_bfloat16, true>(p.width, run);
  return half ? for_width<__half, false>(p.width, run) : for_width<__nv_bfloat16, false>(p.width, run);
}

}  // namespace
}  // namespace ppnet::cuda
