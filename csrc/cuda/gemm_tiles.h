// Tiles of matrix products on tensor cores: copies of rows to shared memory through cp.async, a pipeline of several
// stages, and the product of a block's tile in registers.
//
// A block of 2 x 2 warps computes kRows x kCols sums in float. A stage holds kDepth values of the inner dimension: the
// left operand as kRows rows of 128 bytes, the right one either the same way (kCols rows, the inner dimension contiguous)
// or as kDepth rows of kCols values (the columns contiguous), in panels of 64 columns. The 16-byte chunks of every row of
// 128 bytes are permuted by the row's number, so that neither ldmatrix, which reads one chunk of 8 rows, nor a copy, which
// writes 8 chunks of a row, meets a bank twice.
#pragma once

#include "prim.h"

namespace ppnet::cuda {

constexpr int kTileThreads = 128;
constexpr int kDepth = 64;
constexpr int kChunk = 8;                      // 16-bit values in 16 bytes
constexpr int kRowsAtOnce = kTileThreads / 8;  // that a block copies: 8 threads to a row of 128 bytes

// kBlocks: that shall fit on an SM, by registers and by shared memory.
template <int kRows_, int kCols_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kRows = kRows_, kCols = kCols_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kStageSize = (kRows + kCols) * kDepth;  // values; the right operand is behind the left one
  static constexpr int kWarpRows = kRows / 2, kWarpCols = kCols / 2;
  static constexpr int kM = kWarpRows / 16, kN = kWarpCols / 8;  // products of a warp
  static constexpr int kPitch = kCols + 8;  // floats between rows of the sums in shared memory: no bank twice
  static constexpr int kStagesBytes = kStages * kStageSize * 2, kSumsBytes = kRows * kPitch * 4;
  static constexpr int kSharedBytes = kStagesBytes > kSumsBytes ? kStagesBytes : kSumsBytes;
  static_assert(kRows % 32 == 0 && kCols % 64 == 0);
};

// Where chunk `chunk` of row `row` of a matrix of 128-byte rows lies.
__device__ inline int swizzled(int row, int chunk) { return row * kDepth + (chunk ^ (row & 7)) * kChunk; }

// How many of 8 values there are where `left` are left.
__device__ __forceinline__ int in_chunk(int left) { return min(max(left, 0), kChunk); }

// Starts to copy 8 values, of which those from `n` on are 0 and not read. kVector: `from` is aligned to 16 bytes; otherwise
// the copy is done at once, value by value. `inside`: an address of the tensor, for copies of nothing.
template <bool kVector, class T>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int n, const T* inside) {
  if constexpr (kVector) {
    cp_async<16>(to, n > 0 ? from : inside, n * 2);
  } else {
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint16_t low = 0, high = 0;
      if (2 * i < n) memcpy(&low, from + 2 * i, 2);
      if (2 * i + 1 < n) memcpy(&high, from + 2 * i + 1, 2);
      bits[i] = uint32_t{high} << 16 | low;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(bits[0], bits[1], bits[2], bits[3]);
  }
}

// Copies of kRows rows of a matrix, kDepth columns at a time, zeros outside of it. It keeps one pointer: one for every row
// would be hoisted out of the loop over the steps into registers that the sums need.
template <int kRows, bool kVector, class T>
struct RowCopies {
  const T *matrix, *next;
  int64_t stride;
  int rows, columns;  // that are left from this thread's first row, and from its next column on

  __device__ RowCopies(const T* matrix, int64_t stride, int first, int rows, int column, int columns)
      : matrix(matrix), stride(stride), rows(rows - first - static_cast<int>(threadIdx.x / 8)),
        columns(columns - column - static_cast<int>(threadIdx.x % 8) * kChunk) {
    next = matrix + (first + threadIdx.x / 8) * stride + column + threadIdx.x % 8 * kChunk;
  }
  __device__ __forceinline__ void start(T* to) {
    const int n = in_chunk(columns);
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i)
      copy_chunk<kVector>(to + swizzled(threadIdx.x / 8 + i * kRowsAtOnce, threadIdx.x % 8),
                          next + i * kRowsAtOnce * stride, i * kRowsAtOnce < rows ? n : 0, matrix);
    next += kDepth;
    columns -= kDepth;
  }
};

// What a warp multiplies at a time: 16 values of the inner dimension.
template <class Tile>
struct Fragments {
  uint32_t a[Tile::kM][4], b[Tile::kN / 2][4];
};

// kColumnsContiguous: how the right operand is stored.
template <class Tile, bool kColumnsContiguous, class T>
__device__ __forceinline__ void load_fragments(Fragments<Tile>& to, const T* stage, int part) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * Tile::kWarpRows + lane % 16;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) ldmatrix_x4(to.a[m], stage + swizzled(row + m * 16, part * 2 + lane / 16));
  const T* right = stage + Tile::kRows * kDepth;
  const int column = warp % 2 * Tile::kWarpCols;
#pragma unroll
  for (int n = 0; n < Tile::kN / 2; ++n) {
    if constexpr (kColumnsContiguous) {
      const int at = column + n * 16;
      ldmatrix_x4_trans(to.b[n], right + at / kDepth * (kDepth * kDepth) +
                                     swizzled(part * 16 + lane % 16, at % kDepth / kChunk + lane / 16));
    } else {
      ldmatrix_x4(to.b[n], right + swizzled(column + n * 16 + lane / 16 * 8 + lane % 8, part * 2 + lane / 8 % 2));
    }
  }
}

template <class Tile>
using Sums = float[Tile::kM][Tile::kN][4];

// sums += the product over `steps` stages, of which load(to, step) starts to copy one, in order. Afterwards shared memory is free.
template <class Tile, bool kColumnsContiguous, class T, class Load>
__device__ __forceinline__ void multiply(Sums<Tile>& sums, T* shared, int steps, Load load) {
  constexpr int kParts = kDepth / 16;
  static_assert(kParts % 2 == 0, "the fragments of a step begin where those of the last one began");
#pragma unroll 1
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) load(shared + step * Tile::kStageSize, step);
    cp_async_commit();
  }
  cp_async_wait<Tile::kStages - 2>();
  __syncthreads();
  Fragments<Tile> fragments[2];
  load_fragments<Tile, kColumnsContiguous>(fragments[0], shared, 0);
  int reading = 0, writing = Tile::kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      // The next part's fragments are on their way while this part is multiplied.
      if (part + 1 < kParts) {
        load_fragments<Tile, kColumnsContiguous>(fragments[(part + 1) % 2], shared + reading * Tile::kStageSize,
                                                 part + 1);
      } else if (step + 1 < steps) {
        cp_async_wait<Tile::kStages - 2>();
        __syncthreads();  // the next stage is there for all; this one has been read by all
        reading = reading + 1 == Tile::kStages ? 0 : reading + 1;
        load_fragments<Tile, kColumnsContiguous>(fragments[0], shared + reading * Tile::kStageSize, 0);
      }
      if (part == 0) {
        if (step + Tile::kStages - 1 < steps) load(shared + writing * Tile::kStageSize, step + Tile::kStages - 1);
        cp_async_commit();
        writing = writing + 1 == Tile::kStages ? 0 : writing + 1;
      }
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
        for (int n = 0; n < Tile::kN; ++n)
          mma_m16n8k16<T>(sums[m][n], fragments[part % 2].a[m], fragments[part % 2].b[n / 2] + n % 2 * 2);
    }
  }
  __syncthreads();
}

// The sums as kRows rows of kPitch floats in shared memory, for all threads.
template <class Tile>
__device__ __forceinline__ void stage_sums(float* shared, const Sums<Tile>& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * Tile::kWarpRows + lane / 4, column = warp % 2 * Tile::kWarpCols + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(shared + (row + m * 16 + half * 8) * Tile::kPitch + column + n * 8) =
            make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
  __syncthreads();
}

}  // namespace ppnet::cuda
