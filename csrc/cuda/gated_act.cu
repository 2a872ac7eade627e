// gated_act and its backward, one pass each. The columns' sums of the backward are made in two stages: over blocks of
// rows, then over the blocks in a fixed order.
#include "gated_act.h"

#include "activations.h"
#include "elements.h"
#include "sizes.h"

namespace ppnet::cuda {
namespace {

constexpr int kThreads = 256;
// Registers for the pieces that are on their way: forward 128 bytes per thread in 24 warps, backward 192 in 16. That is
// 98 KB per multiprocessor of the H200, where 30 KB cover memory's latency at 4.3 TB/s.
template <class T>
constexpr int kForwardBlocksPerSm = sizeof(T) == 8 ? 2 : 3;
constexpr int kBackwardBlocksPerSm = 2;
constexpr int kRowsAtOnce = 4;        // of a thread, on their way together
constexpr int kScalarRowsAtOnce = 8;  // of single elements
constexpr int kForwardRows = 8;         // of a thread
constexpr int64_t kManyBlocks = 132 * 8;
constexpr int64_t kMostBackwardRows = 64, kLeastBackwardRows = 8;

// Where a thread works.
struct Place {
  int64_t col, row, end, step;  // rows row, row + step, ... below end
  int64_t block;
  bool inside;

  __device__ Place(const GatedAct& job, const GatedActPlan& plan, int size) {
    const int thread = threadIdx.x;
    block = blockIdx.x / plan.col_tiles;
    col = (blockIdx.x % plan.col_tiles * plan.across + thread % plan.across) * size;
    inside = col < job.cols;
    step = kThreads / plan.across;
    row = block * plan.block_rows + thread / plan.across;
    end = (block + 1) * plan.block_rows < job.rows ? (block + 1) * plan.block_rows : job.rows;
  }
};

template <class T, int kSize>
__device__ __forceinline__ Pack<T, kSize> read(const void* base, int64_t stride, int64_t row, int64_t col) {
  return *reinterpret_cast<const Pack<T, kSize>*>(static_cast<const T*>(base) + row * stride + col);
}
template <class T, int kSize>
__device__ __forceinline__ void write(void* base, int64_t stride, int64_t row, int64_t col, const Pack<T, kSize>& v) {
  *reinterpret_cast<Pack<T, kSize>*>(static_cast<T*>(base) + row * stride + col) = v;
}

template <class C, int kSize>
__device__ __forceinline__ void read_factors(const void* z, int64_t col, C* factor) {
#pragma unroll
  for (int k = 0; k < kSize; ++k) factor[k] = z ? static_cast<const C*>(z)[col + k] : C(1);
}

template <class T, int kSize>
__global__ void __launch_bounds__(kThreads, kForwardBlocksPerSm<T>)
    gated_act_kernel(const __grid_constant__ GatedAct job, const __grid_constant__ GatedActPlan plan) {
  using C = arithmetic_t<T>;
  constexpr int kRows = kSize == 1 ? kScalarRowsAtOnce : kRowsAtOnce;
  constexpr bool kShort = sizeof(T) == 2;
  const Place at(job, plan, kSize);
  if (!at.inside) return;
  C z[kSize];
  read_factors<C, kSize>(job.z, at.col, z);
  for (int64_t row = at.row; row < at.end; row += kRows * at.step) {
    Pack<T, kSize> up[kRows], gate[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t r = row + j * at.step;
      if (r >= at.end) continue;
      up[j] = read<T, kSize>(job.up, job.up_stride, r, at.col);
      gate[j] = job.gate ? read<T, kSize>(job.gate, job.gate_stride, r, at.col) : up[j];
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t r = row + j * at.step;
      if (r >= at.end) continue;
      Pack<T, kSize> h;
      with_act(job.act, [&](auto act) {
        C x[kSize], of_up[kSize];
        gate[j].widen(x);
        up[j].widen(of_up);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          x[k] = decltype(act)::template value<kShort>(x[k]);
          if (job.gate) x[k] *= of_up[k];
          if (job.z) x[k] *= z[k];
        }
        h.round(x);
      });
      write<T, kSize>(job.h, job.cols, r, at.col, h);
    }
  }
}

template <class T, int kSize>
__global__ void __launch_bounds__(kThreads, kBackwardBlocksPerSm)
    gated_act_backward_kernel(const __grid_constant__ GatedAct job, const __grid_constant__ GatedActPlan plan) {
  using C = arithmetic_t<T>;
  constexpr int kRows = kSize == 1 ? kScalarRowsAtOnce : kRowsAtOnce;
  constexpr bool kShort = sizeof(T) == 2;
  __shared__ C sums[kThreads][kSize];
  const Place at(job, plan, kSize);
  C sum[kSize] = {};
  if (at.inside) {
    C z[kSize];
    read_factors<C, kSize>(job.z, at.col, z);
    for (int64_t row = at.row; row < at.end; row += kRows * at.step) {
      Pack<T, kSize> dh[kRows], up[kRows], gate[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int64_t r = row + j * at.step;
        if (r >= at.end) continue;
        dh[j] = read<T, kSize>(job.dh, job.dh_stride, r, at.col);
        up[j] = read<T, kSize>(job.up, job.up_stride, r, at.col);
        gate[j] = job.gate ? read<T, kSize>(job.gate, job.gate_stride, r, at.col) : up[j];
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int64_t r = row + j * at.step;
        if (r >= at.end) continue;
        Pack<T, kSize> dup, dgate;
        with_act(job.act, [&](auto act) {
          C of_dh[kSize], of_up[kSize], of_gate[kSize];
          dh[j].widen(of_dh);
          up[j].widen(of_up);
          gate[j].widen(of_gate);
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            const C through = of_dh[k] * z[k];
            C f, slope;
            decltype(act)::template both<kShort>(of_gate[k], f, slope);
            sum[k] += job.gate ? of_dh[k] * f * of_up[k] : of_dh[k] * f;
            of_gate[k] = through * of_up[k] * slope;
            of_up[k] = through * (job.gate ? f : slope);
          }
          dup.round(of_up);
          dgate.round(of_gate);
        });
        if (job.dup) write<T, kSize>(job.dup, job.cols, r, at.col, dup);
        if (job.dgate) write<T, kSize>(job.dgate, job.cols, r, at.col, dgate);
      }
    }
  }
  if (!job.dz) return;
#pragma unroll
  for (int k = 0; k < kSize; ++k) sums[threadIdx.x][k] = sum[k];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= plan.across || !at.inside) return;
  C* partial = static_cast<C*>(job.partial) + at.block * job.cols + at.col;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    C total = 0;
    for (int t = threadIdx.x; t < kThreads; t += plan.across) total += sums[t][k];
    partial[k] = total;
  }
}

// dz of 32 columns: the warps divide the blocks of rows.
template <class C>
__global__ void __launch_bounds__(kThreads)
    gated_act_sums_kernel(const C* partial, C* dz, int64_t blocks, int64_t cols) {
  constexpr int kWarps = kThreads / 32;
  __shared__ C sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t col = int64_t(blockIdx.x) * 32 + lane;
  C sum = 0;
  if (col < cols) {
#pragma unroll 8
    for (int64_t b = warp; b < blocks; b += kWarps) sum += partial[b * cols + col];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || col >= cols) return;
  C total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
  dz[col] = total;
}

bool even_rows(const void* data, int64_t stride, int64_t size) {
  return !data || (aligned_to(data) && stride * size % 16 == 0);
}

template <class T>
cudaError_t forward(const GatedAct& job, cudaStream_t stream) {
  const GatedActPlan plan = gated_act_plan(job, false);
  const auto blocks = static_cast<unsigned>(plan.col_tiles * plan.row_blocks);
  const auto kernel = plan.vectors ? gated_act_kernel<T, 16 / sizeof(T)> : gated_act_kernel<T, 1>;
  return blocks ? launch(kernel, blocks, kThreads, 0, stream, job, plan) : cudaSuccess;
}

template <class T>
cudaError_t backward(const GatedAct& job, cudaStream_t stream) {
  using C = arithmetic_t<T>;
  const GatedActPlan plan = gated_act_plan(job, true);
  const auto blocks = static_cast<unsigned>(plan.col_tiles * plan.row_blocks);
  const auto kernel = plan.vectors ? gated_act_backward_kernel<T, 16 / sizeof(T)> : gated_act_backward_kernel<T, 1>;
  const cudaError_t error = blocks ? launch(kernel, blocks, kThreads, 0, stream, job, plan) : cudaSuccess;
  if (error != cudaSuccess || !job.dz || job.cols == 0) return error;
  return launch(gated_act_sums_kernel<C>, static_cast<unsigned>(ceil_div(job.cols, 32)), kThreads, 0, stream,
                static_cast<const C*>(job.partial), static_cast<C*>(job.dz), plan.row_blocks, job.cols);
}

}  // namespace

GatedActPlan gated_act_plan(const GatedAct& job, bool backward) {
  const int64_t size = ppnet::element_size(job.dtype);
  GatedActPlan plan{};
  plan.vectors = job.cols * size % 16 == 0 && even_rows(job.up, job.up_stride, size) &&
                 even_rows(job.gate, job.gate_stride, size) && even_rows(job.dh, job.dh_stride, size) &&
                 even_rows(job.h, job.cols, size) && even_rows(job.dup, job.cols, size) &&
                 even_rows(job.dgate, job.cols, size);
  const int64_t pieces = plan.vectors ? job.cols * size / 16 : job.cols;
  plan.across = 1;
  while (plan.across < kThreads && plan.across < pieces) plan.across *= 2;
  plan.col_tiles = ceil_div(pieces, plan.across);
  const int64_t step = kThreads / plan.across;
  int64_t rows = kForwardRows;
  // Fewer blocks of rows write fewer sums: 8 / rows bytes of 10 per element of bf16; but all multiprocessors want work.
  if (backward) {
    rows = kMostBackwardRows;
    while (rows > kLeastBackwardRows && plan.col_tiles * ceil_div(job.rows, rows * step) < kManyBlocks) rows /= 2;
  }
  plan.block_rows = rows * step;
  plan.row_blocks = ceil_div(job.rows, plan.block_rows);
  return plan;
}

int gated_act(const GatedAct& job, int device, void* stream) {
  // The static runtime keeps its own current device, which torch's does not set.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (job.dtype) {
    case ppnet::Dtype::f32: return forward<float>(job, s);
    case ppnet::Dtype::bf16: return forward<__nv_bfloat16>(job, s);
    case ppnet::Dtype::f16: return forward<__half>(job, s);
    case ppnet::Dtype::f64: return forward<double>(job, s);
  }
  return cudaErrorInvalidValue;
}

int gated_act_backward(const GatedAct& job, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (job.dtype) {
    case ppnet::Dtype::f32: return backward<float>(job, s);
    case ppnet::Dtype::bf16: return backward<__nv_bfloat16>(job, s);
    case ppnet::Dtype::f16: return backward<__half>(job, s);
    case ppnet::Dtype::f64: return backward<double>(job, s);
  }
  return cudaErrorInvalidValue;
}

}  // namespace ppnet::cuda
