// gather_rows and scatter_rows: one launch for many tensors, whose descriptors travel as a kernel parameter.
#include "rows.h"

#include "elements.h"
#include "table.h"

namespace ppnet::cuda {
namespace {

constexpr int kTensors = 32;      // 32 descriptors are 3.8 KB: kernel parameters hold 4 KB
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 3;    // up to 85 registers: without a bound, ptxas for sm_100 chose 32 and spilled
constexpr int kPieceBytes = 2048;  // of a row, per warp: four 16-byte accesses of every lane in flight

using Table = TileTable<RowsTensor, kTensors>;

// 16 bytes of a row.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

template <class T>
__device__ inline Vector<T> scaled(Vector<T> v, arithmetic_t<T> scale) {
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) v.x[i] = rounded<T>(widened(v.x[i]) * scale);
  return v;
}

__device__ inline int64_t checked(int64_t f, int64_t full) {
  assert(f >= 0 && f < full && "gather_rows, scatter_rows: idx out of range");
  return f;
}

// One warp copies `n` contiguous elements, or writes zeros where `from` is null; `scale` may be null.
template <class T>
__device__ void copy_piece(T* to, const T* from, const arithmetic_t<T>* scale, int64_t n, int lane) {
  using V = Vector<T>;
  const arithmetic_t<T> factor = scale ? *scale : arithmetic_t<T>(1);
  int64_t done = 0;
  if (aligned_to(to) && aligned_to(from)) {
    done = n / V::kSize * V::kSize;
#pragma unroll 4
    for (int64_t c = int64_t(lane) * V::kSize; c < done; c += 32 * V::kSize) {
      V v{};
      if (from) v = *reinterpret_cast<const V*>(from + c);
      if (from && scale) v = scaled<T>(v, factor);
      *reinterpret_cast<V*>(to + c) = v;
    }
  }
  for (int64_t c = done + lane; c < n; c += 32)
    to[c] = !from ? rounded<T>(0) : scale ? rounded<T>(widened(from[c]) * factor) : from[c];
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) gather_rows_kernel(const __grid_constant__ Table table) {
  using C = arithmetic_t<T>;
  constexpr int64_t kPiece = kPieceBytes / sizeof(T);
  const int lane = threadIdx.x % 32;
  const int64_t tiles = table.tile_end[table.n - 1];
  for (int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; w < tiles; w += int64_t(gridDim.x) * kWarps) {
    int64_t tile = w;
    const RowsTensor& t = find(table, tile);
    const int64_t pieces = (t.cols + kPiece - 1) / kPiece;
    const int64_t row = tile / pieces, begin = tile % pieces * kPiece;
    const int64_t n = min(kPiece, t.cols - begin);
    const T* src = static_cast<const T*>(t.src);
    const C* scale = static_cast<const C*>(t.scale);
    T* out = static_cast<T*>(t.out) + row * t.cols + begin;
    if (!t.columns) {
      src += checked(t.idx[row], t.full) * t.src_stride + begin;
      copy_piece(out, src, scale ? scale + row : nullptr, n, lane);
      continue;
    }
    src += row * t.src_stride;
#pragma unroll 4
    for (int64_t c = lane; c < n; c += 32) {
      const T x = src[checked(t.idx[begin + c], t.full)];
      out[c] = scale ? rounded<T>(widened(x) * scale[begin + c]) : x;
    }
  }
}

// slot[idx[k]] = k; a tile is 32 values of k.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) slot_kernel(const __grid_constant__ Table table) {
  const int64_t tiles = table.tile_end[table.n - 1];
  for (int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; w < tiles; w += int64_t(gridDim.x) * kWarps) {
    int64_t tile = w;
    const RowsTensor& t = find(table, tile);
    const int64_t k = tile * 32 + threadIdx.x % 32;
    if (k >= t.kept) continue;
    const int before = atomicExch(t.slot + checked(t.idx[k], t.full), static_cast<int>(k));
    assert(before == -1 && "scatter_rows: idx is not unique");
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) scatter_rows_kernel(const __grid_constant__ Table table) {
  using C = arithmetic_t<T>;
  constexpr int64_t kPiece = kPieceBytes / sizeof(T);
  const int lane = threadIdx.x % 32;
  const int64_t tiles = table.tile_end[table.n - 1];
  for (int64_t w = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; w < tiles; w += int64_t(gridDim.x) * kWarps) {
    int64_t tile = w;
    const RowsTensor& t = find(table, tile);
    const int64_t pieces = (t.cols + kPiece - 1) / kPiece;
    const int64_t row = tile / pieces, begin = tile % pieces * kPiece;
    const int64_t n = min(kPiece, t.cols - begin);
    const T* src = static_cast<const T*>(t.src);
    const C* scale = static_cast<const C*>(t.scale);
    T* out = static_cast<T*>(t.out) + row * t.cols + begin;
    if (!t.columns) {
      const int k = t.slot[row];
      copy_piece(out, k < 0 ? nullptr : src + k * t.src_stride + begin, scale && k >= 0 ? scale + k : nullptr, n, lane);
      continue;
    }
    src += row * t.src_stride;
#pragma unroll 4
    for (int64_t c = lane; c < n; c += 32) {
      const int k = t.slot[begin + c];
      T x = rounded<T>(0);
      if (k >= 0) x = scale ? rounded<T>(widened(src[k]) * scale[k]) : src[k];
      out[c] = x;
    }
  }
}

// dot[k]. Rows: a tile is one k, whose row a warp reads. Columns: a tile is 32 values of k, one per lane, and the warps of
// a block divide the rows. Sums are made in a fixed order, so the result does not vary.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) row_dot_kernel(const __grid_constant__ Table table) {
  using C = arithmetic_t<T>;
  __shared__ C sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tiles = table.tile_end[table.n - 1];
  for (int64_t b = blockIdx.x; b < tiles; b += gridDim.x) {
    int64_t tile = b;
    const RowsTensor& t = find(table, tile);
    const int64_t k = t.columns ? tile * 32 + lane : tile;
    C sum = 0;
    if (k < t.kept) {
      const int64_t f = checked(t.idx[k], t.full);
      const T* src = static_cast<const T*>(t.src) + (t.columns ? k : k * t.src_stride);
      const T* weight = static_cast<const T*>(t.weight) + (t.columns ? f : f * t.weight_stride);
      if (t.columns) {
#pragma unroll 4
        for (int64_t r = warp; r < t.rows; r += kWarps)
          sum += widened(src[r * t.src_stride]) * widened(weight[r * t.weight_stride]);
      } else {
#pragma unroll 4
        for (int64_t c = threadIdx.x; c < t.cols; c += kThreads) sum += widened(src[c]) * widened(weight[c]);
      }
    }
    if (!t.columns) {
#pragma unroll
      for (int width = 16; width > 0; width /= 2) sum += __shfl_down_sync(0xffffffffu, sum, width);
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && k < t.kept && (t.columns || lane == 0)) {
      C total = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) total += sums[i][lane];
      static_cast<C*>(t.dot)[k] = total;
    }
    __syncthreads();
  }
}

template <class T>
int64_t matrix_tiles(const RowsTensor& t) {
  constexpr int64_t kPiece = kPieceBytes / sizeof(T);
  return t.rows * ((t.cols + kPiece - 1) / kPiece);
}
int64_t kept_tiles(const RowsTensor& t) { return (t.kept + 31) / 32; }
int64_t dot_tiles(const RowsTensor& t) { return t.columns ? kept_tiles(t) : t.kept; }

template <class T>
cudaError_t gather(Dtype dtype, const RowsTensor* tensors, int n, cudaStream_t stream) {
  return launch_over(gather_rows_kernel<T>, tensors, n, stream, kThreads, kWarps, matrix_tiles<T>,
                     [=](const RowsTensor& t) { return t.dtype == dtype; });
}

template <class T>
cudaError_t scatter(Dtype dtype, const RowsTensor* tensors, int n, cudaStream_t stream) {
  const cudaError_t error =
      launch_over(row_dot_kernel<T>, tensors, n, stream, kThreads, 1, dot_tiles,
                  [=](const RowsTensor& t) { return t.dtype == dtype && t.weight != nullptr; });
  if (error != cudaSuccess) return error;
  return launch_over(scatter_rows_kernel<T>, tensors, n, stream, kThreads, kWarps, matrix_tiles<T>,
                     [=](const RowsTensor& t) { return t.dtype == dtype && t.out != nullptr; });
}

}  // namespace

int gather_rows(const RowsTensor* tensors, int n, int device, void* stream) {
  // The static runtime keeps its own current device, which torch's does not set.
  cudaError_t error = cudaSetDevice(device);
  const auto s = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess) error = gather<float>(Dtype::f32, tensors, n, s);
  if (error == cudaSuccess) error = gather<__nv_bfloat16>(Dtype::bf16, tensors, n, s);
  if (error == cudaSuccess) error = gather<__half>(Dtype::f16, tensors, n, s);
  if (error == cudaSuccess) error = gather<double>(Dtype::f64, tensors, n, s);
  return error;
}

int scatter_rows(const RowsTensor* tensors, int n, int32_t* slots, int64_t slot_count, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  const auto s = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess && slot_count > 0)
    error = cudaMemsetAsync(slots, 0xff, static_cast<size_t>(slot_count) * sizeof(int32_t), s);
  if (error == cudaSuccess)
    error = launch_over(slot_kernel, tensors, n, s, kThreads, kWarps, kept_tiles,
                        [](const RowsTensor& t) { return t.slot != nullptr; });
  if (error == cudaSuccess) error = scatter<float>(Dtype::f32, tensors, n, s);
  if (error == cudaSuccess) error = scatter<__nv_bfloat16>(Dtype::bf16, tensors, n, s);
  if (error == cudaSuccess) error = scatter<__half>(Dtype::f16, tensors, n, s);
  if (error == cudaSuccess) error = scatter<double>(Dtype::f64, tensors, n, s);
  return error;
}

int kernels_run(int device) {
  cudaError_t error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, gather_rows_kernel<float>);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would return it
  return error;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ppnet::cuda
