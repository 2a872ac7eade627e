// row_norms and its gradient: one launch for many weights, whose descriptors travel as a kernel parameter. Sums along
// rows are a warp's; sums along columns are made over blocks of rows, then over the blocks in a fixed order.
#include "row_norms.h"

#include "elements.h"
#include "table.h"

namespace ppnet::cuda {
namespace {

constexpr int kTensors = 30;  // of 120 bytes: kernel parameters hold 4 KB
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpRows = 2;      // rows that a warp sums together: they share the factors of columns
constexpr int kRowsAtOnce = 4;    // pieces of a column that a thread has on their way together
constexpr int64_t kMostRows = 64, kLeastRows = 8;  // of a thread that sums columns
constexpr int64_t kEnoughBlocks = 132;

using Table = TileTable<RowNormsTensor, kTensors>;

// 16 bytes at a time, or single elements.
__host__ __device__ inline bool vectors(const RowNormsTensor& t) {
  const int64_t size = t.dtype == ppnet::Dtype::f64 ? 8 : t.dtype == ppnet::Dtype::f32 ? 4 : 2;
  return t.cols * size % 16 == 0 && t.stride * size % 16 == 0 && aligned_to(t.weight) && aligned_to(t.dweight) &&
         aligned_to(t.scale) && aligned_to(t.unit);
}

// How the sums of columns are divided.
struct Tiles {
  int across;  // threads of a block along the columns, a power of two; the others take further rows
  int64_t col_tiles, row_blocks, block_rows;
};
__host__ __device__ inline Tiles tiles_of(const RowNormsTensor& t) {
  const int64_t size = t.dtype == ppnet::Dtype::f64 ? 8 : t.dtype == ppnet::Dtype::f32 ? 4 : 2;
  const int64_t pieces = vectors(t) ? t.cols * size / 16 : t.cols;
  Tiles tiles;
  tiles.across = 1;
  while (tiles.across < kThreads && tiles.across < pieces) tiles.across *= 2;
  tiles.col_tiles = ceil_div(pieces, tiles.across);
  const int64_t step = kThreads / tiles.across;
  // Fewer blocks of rows write fewer sums, but all multiprocessors want work.
  int64_t rows = kMostRows;
  while (rows > kLeastRows && tiles.col_tiles * ceil_div(t.rows, rows * step) < kEnoughBlocks) rows /= 2;
  tiles.block_rows = rows * step;
  tiles.row_blocks = ceil_div(t.rows, tiles.block_rows);
  return tiles;
}

// A vector has no features: its norms are absolute values.
__host__ __device__ inline bool is_absolute(const RowNormsTensor& t) { return t.columns && t.rows == 1 && !t.scale; }

template <class T>
using C = arithmetic_t<T>;

__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }
__device__ inline float size_of(float x) { return fabsf(x); }
__device__ inline double size_of(double x) { return fabs(x); }

// Factor k, or 1 where there are none; squared for gradients of the scale's axis.
template <class F>
__device__ inline F factor_at(const void* factors, int64_t k, bool squared) {
  if (!factors) return 1;
  const F x = static_cast<const F*>(factors)[k];
  return squared ? x * x : x;
}

// The factors of a piece, 16 bytes at a time.
template <class F, int kSize>
__device__ __forceinline__ void read_factors(const void* factors, int64_t col, bool squared, F* factor) {
  constexpr int kOnce = kSize == 1 ? 1 : 16 / sizeof(F);
#pragma unroll
  for (int k = 0; k < kSize; k += kOnce) {
    Pack<F, kOnce> x;
    if (factors) x = *reinterpret_cast<const Pack<F, kOnce>*>(static_cast<const F*>(factors) + col + k);
#pragma unroll
    for (int j = 0; j < kOnce; ++j) factor[k + j] = !factors ? F(1) : squared ? x.x[j] * x.x[j] : x.x[j];
  }
}

// What rows and columns are multiplied with: forward by the scale, backward by scale² and grad / norm.
struct Factors {
  const void *row, *col;
  bool row_squared, col_squared;
};
template <bool kBackward>
__device__ inline Factors factors_of(const RowNormsTensor& t) {
  if (t.columns) return {t.scale, kBackward ? t.unit : nullptr, kBackward, false};
  return {kBackward ? t.unit : nullptr, t.scale, false, kBackward};
}

// One piece of a row. Forward: (w · factor)²; backward: w² · the factor of the axis that is summed, and dweight.
template <class T, int kSize, bool kBackward>
__device__ __forceinline__ void take_piece(const RowNormsTensor& t, const Pack<T, kSize>& piece, int64_t row,
                                           int64_t col, C<T> row_factor, const C<T>* col_factor, bool by_row,
                                           C<T>* square) {
  C<T> x[kSize];
  piece.widen(x);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    if constexpr (kBackward) {
      square[k] = x[k] * x[k] * (by_row ? col_factor[k] : row_factor);
      x[k] *= row_factor * col_factor[k];
    } else {
      const C<T> y = x[k] * (by_row ? col_factor[k] : row_factor);
      square[k] = y * y;
    }
  }
  if (kBackward && t.dweight) {
    Pack<T, kSize> out;
    out.round(x);
    *reinterpret_cast<Pack<T, kSize>*>(static_cast<T*>(t.dweight) + row * t.cols + col) = out;
  }
}

template <class T, int kSize>
__device__ __forceinline__ Pack<T, kSize> piece_at(const RowNormsTensor& t, int64_t row, int64_t col) {
  return *reinterpret_cast<const Pack<T, kSize>*>(static_cast<const T*>(t.weight) + row * t.stride + col);
}

// A warp sums up to kWarpRows rows.
template <class T, int kSize, bool kBackward>
__device__ void sum_rows(const RowNormsTensor& t, int64_t first, int lane) {
  const Factors factors = factors_of<kBackward>(t);
  C<T> row_factor[kWarpRows], sum[kWarpRows] = {};
#pragma unroll
  for (int j = 0; j < kWarpRows; ++j)
    row_factor[j] = first + j < t.rows ? factor_at<C<T>>(factors.row, first + j, factors.row_squared) : C<T>(0);
#pragma unroll 4
  for (int64_t col = int64_t(lane) * kSize; col < t.cols; col += 32 * kSize) {
    C<T> col_factor[kSize];
    read_factors<C<T>, kSize>(factors.col, col, factors.col_squared, col_factor);
#pragma unroll
    for (int j = 0; j < kWarpRows; ++j) {
      if (first + j >= t.rows) continue;
      C<T> square[kSize], total = 0;
      take_piece<T, kSize, kBackward>(t, piece_at<T, kSize>(t, first + j, col), first + j, col, row_factor[j],
                                      col_factor, true, square);
#pragma unroll
      for (int k = 0; k < kSize; ++k) total += square[k];
      sum[j] += total;
    }
  }
#pragma unroll
  for (int j = 0; j < kWarpRows; ++j) {
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], bit);
    if (lane != 0 || first + j >= t.rows || !t.out) continue;
    C<T>* out = static_cast<C<T>*>(t.out) + first + j;
    *out = kBackward ? sum[j] * factor_at<C<T>>(t.scale, first + j, false) : root(sum[j]);
  }
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) sum_rows_kernel(const __grid_constant__ Table table) {
  const int64_t tiles = table.tile_end[table.n - 1];
  for (int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; w < tiles; w += int64_t(gridDim.x) * kWarps) {
    int64_t tile = w;
    const RowNormsTensor& t = find(table, tile);
    if (vectors(t)) sum_rows<T, 16 / sizeof(T), kBackward>(t, tile * kWarpRows, threadIdx.x % 32);
    else sum_rows<T, 1, kBackward>(t, tile * kWarpRows, threadIdx.x % 32);
  }
}

// A block sums its rows of some columns into `partial`. `sums`: shared, kThreads * kSize.
template <class T, int kSize, bool kBackward>
__device__ void sum_columns(const RowNormsTensor& t, int64_t tile, C<T>* sums) {
  const Tiles tiles = tiles_of(t);
  const Factors factors = factors_of<kBackward>(t);
  const int thread = threadIdx.x;
  const int64_t block = tile / tiles.col_tiles, step = kThreads / tiles.across;
  const int64_t col = (tile % tiles.col_tiles * tiles.across + thread % tiles.across) * kSize;
  const int64_t end = min((block + 1) * tiles.block_rows, t.rows);
  C<T> sum[kSize] = {};
  if (col < t.cols) {
    C<T> col_factor[kSize];
    read_factors<C<T>, kSize>(factors.col, col, factors.col_squared, col_factor);
    for (int64_t row = block * tiles.block_rows + thread / tiles.across; row < end; row += kRowsAtOnce * step) {
      Pack<T, kSize> piece[kRowsAtOnce];
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j)
        if (row + j * step < end) piece[j] = piece_at<T, kSize>(t, row + j * step, col);
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        const int64_t r = row + j * step;
        if (r >= end) continue;
        C<T> square[kSize];
        take_piece<T, kSize, kBackward>(t, piece[j], r, col, factor_at<C<T>>(factors.row, r, factors.row_squared),
                                        col_factor, false, square);
#pragma unroll
        for (int k = 0; k < kSize; ++k) sum[k] += square[k];
      }
    }
  }
  if (!t.partial) return;
#pragma unroll
  for (int k = 0; k < kSize; ++k) sums[thread * kSize + k] = sum[k];
  __syncthreads();
  if (thread < tiles.across && col < t.cols) {
    C<T>* partial = static_cast<C<T>*>(t.partial) + block * t.cols + col;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      C<T> total = 0;
      for (int other = thread; other < kThreads; other += tiles.across) total += sums[other * kSize + k];
      partial[k] = total;
    }
  }
  __syncthreads();
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) sum_columns_kernel(const __grid_constant__ Table table) {
  __shared__ C<T> sums[kThreads * 16 / sizeof(T)];
  const int64_t tiles = table.tile_end[table.n - 1];
  for (int64_t b = blockIdx.x; b < tiles; b += gridDim.x) {
    int64_t tile = b;
    const RowNormsTensor& t = find(table, tile);
    if (vectors(t)) sum_columns<T, 16 / sizeof(T), kBackward>(t, tile, sums);
    else sum_columns<T, 1, kBackward>(t, tile, sums);
  }
}

// The sums of 32 columns over the blocks of rows, which the warps divide; or 32 absolute values.
template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads) finish_columns_kernel(const __grid_constant__ Table table) {
  __shared__ C<T> sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tiles = table.tile_end[table.n - 1];
  for (int64_t b = blockIdx.x; b < tiles; b += gridDim.x) {
    int64_t tile = b;
    const RowNormsTensor& t = find(table, tile);
    const int64_t col = tile * 32 + lane, blocks = tiles_of(t).row_blocks;
    const bool absolute = !kBackward && is_absolute(t);
    C<T>* out = static_cast<C<T>*>(t.out);
    C<T> sum = 0;
    if (col < t.cols && !absolute) {
      const C<T>* partial = static_cast<const C<T>*>(t.partial);
#pragma unroll 4
      for (int64_t block = warp; block < blocks; block += kWarps) sum += partial[block * t.cols + col];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && col < t.cols) {
      C<T> total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
      if (absolute) out[col] = size_of(C<T>(widened(static_cast<const T*>(t.weight)[col])));
      else out[col] = kBackward ? total * factor_at<C<T>>(t.scale, col, false) : root(total);
    }
    __syncthreads();
  }
}

// unit = grad / norm, 0 where the norm is 0; a tile is 32 units.
template <class T>
__global__ void __launch_bounds__(kThreads) units_kernel(const __grid_constant__ Table table) {
  const int64_t tiles = table.tile_end[table.n - 1];
  for (int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; w < tiles; w += int64_t(gridDim.x) * kWarps) {
    int64_t tile = w;
    const RowNormsTensor& t = find(table, tile);
    const int64_t u = tile * 32 + threadIdx.x % 32;
    if (u >= (t.columns ? t.cols : t.rows)) continue;
    const C<T> norm = static_cast<const C<T>*>(t.norm)[u];
    static_cast<C<T>*>(t.unit)[u] = norm == 0 ? C<T>(0) : static_cast<const C<T>*>(t.grad)[u] / norm;
  }
}

int64_t row_tiles(const RowNormsTensor& t) { return ceil_div(t.rows, kWarpRows); }
int64_t column_tiles(const RowNormsTensor& t) { return tiles_of(t).col_tiles * tiles_of(t).row_blocks; }
int64_t finish_tiles(const RowNormsTensor& t) { return ceil_div(t.cols, 32); }
int64_t unit_tiles(const RowNormsTensor& t) { return ceil_div(t.columns ? t.cols : t.rows, 32); }

template <class T>
cudaError_t forward(ppnet::Dtype dtype, const RowNormsTensor* tensors, int n, cudaStream_t stream) {
  cudaError_t error = launch_over(sum_rows_kernel<T, false>, tensors, n, stream, kThreads, kWarps, row_tiles,
                                  [=](const RowNormsTensor& t) { return t.dtype == dtype && !t.columns; });
  if (error != cudaSuccess) return error;
  error = launch_over(sum_columns_kernel<T, false>, tensors, n, stream, kThreads, 1, column_tiles,
                      [=](const RowNormsTensor& t) { return t.dtype == dtype && t.columns && !is_absolute(t); });
  if (error != cudaSuccess) return error;
  return launch_over(finish_columns_kernel<T, false>, tensors, n, stream, kThreads, 1, finish_tiles,
                     [=](const RowNormsTensor& t) { return t.dtype == dtype && t.columns; });
}

template <class T>
cudaError_t backward(ppnet::Dtype dtype, const RowNormsTensor* tensors, int n, cudaStream_t stream) {
  const auto wanted = [=](const RowNormsTensor& t) { return t.dtype == dtype && (t.dweight || t.out); };
  cudaError_t error = launch_over(units_kernel<T>, tensors, n, stream, kThreads, kWarps, unit_tiles, wanted);
  if (error != cudaSuccess) return error;
  error = launch_over(sum_rows_kernel<T, true>, tensors, n, stream, kThreads, kWarps, row_tiles,
                      [=](const RowNormsTensor& t) { return wanted(t) && t.columns; });
  if (error != cudaSuccess) return error;
  error = launch_over(sum_columns_kernel<T, true>, tensors, n, stream, kThreads, 1, column_tiles,
                      [=](const RowNormsTensor& t) { return wanted(t) && !t.columns; });
  if (error != cudaSuccess) return error;
  return launch_over(finish_columns_kernel<T, true>, tensors, n, stream, kThreads, 1, finish_tiles,
                     [=](const RowNormsTensor& t) { return wanted(t) && !t.columns && t.out; });
}

}  // namespace

int64_t norm_row_blocks(const RowNormsTensor& t) { return tiles_of(t).row_blocks; }

int row_norms(const RowNormsTensor* tensors, int n, int device, void* stream) {
  // The static runtime keeps its own current device, which torch's does not set.
  cudaError_t error = cudaSetDevice(device);
  const auto s = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess) error = forward<float>(ppnet::Dtype::f32, tensors, n, s);
  if (error == cudaSuccess) error = forward<__nv_bfloat16>(ppnet::Dtype::bf16, tensors, n, s);
  if (error == cudaSuccess) error = forward<__half>(ppnet::Dtype::f16, tensors, n, s);
  if (error == cudaSuccess) error = forward<double>(ppnet::Dtype::f64, tensors, n, s);
  return error;
}

int row_norms_backward(const RowNormsTensor* tensors, int n, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  const auto s = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess) error = backward<float>(ppnet::Dtype::f32, tensors, n, s);
  if (error == cudaSuccess) error = backward<__nv_bfloat16>(ppnet::Dtype::bf16, tensors, n, s);
  if (error == cudaSuccess) error = backward<__half>(ppnet::Dtype::f16, tensors, n, s);
  if (error == cudaSuccess) error = backward<double>(ppnet::Dtype::f64, tensors, n, s);
  return error;
}

}  // namespace ppnet::cuda
