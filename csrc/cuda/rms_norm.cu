// rms_norm: a warp per narrow row, as a head's, or a block per wide one. A row is read twice, the second time from the
// L1 cache.
#include "norms.h"

#include "vector.h"

namespace ppnet::cuda {
namespace {

constexpr int64_t kNarrow = 1024;  // elements: what a warp reads in at most four to eight turns
constexpr int kWideWarps = 16;     // 512 threads: 4096 bf16 elements in one turn
constexpr int kRowsPerBlock = 4;   // narrow ones
constexpr int64_t kMostBlocks = 1 << 20;

// kWarps: of a row.
template <class E, int kWarps>
__global__ void __launch_bounds__(512) rms_norm_kernel(const __grid_constant__ RmsNorm job) {
  constexpr int kV = kVector<E>, kThreads = kWarps * 32;
  __shared__ float sums[kWarps];
  const int rows_at_once = static_cast<int>(blockDim.x) / kThreads, thread = static_cast<int>(threadIdx.x) % kThreads;
  const auto* weight = static_cast<const E*>(job.weight);
  const bool whole = job.width % kV == 0;
  const bool aligned_x = whole && aligned_to(job.x), aligned_y = whole && aligned_to(job.y);
  const bool aligned_weight = aligned_to(weight);
  const int64_t stride = int64_t(gridDim.x) * rows_at_once;
  for (int64_t first = int64_t(blockIdx.x) * rows_at_once; first < job.rows; first += stride) {
    const int64_t r = first + threadIdx.x / kThreads;
    const bool there = r < job.rows;
    const E* x = static_cast<const E*>(job.x) + (there ? r : 0) * job.width;
    E* y = static_cast<E*>(job.y) + (there ? r : 0) * job.width;
    float sum = 0.0f;
    for (int64_t c = thread * kV; c < job.width; c += kThreads * kV) {
      float v[kV];
      to_floats<E>(load_part(x + c, job.width - c, aligned_x), v);
#pragma unroll
      for (int i = 0; i < kV; ++i) sum = fmaf(v[i], v[i], sum);
    }
    sum = warp_sum(sum);
    if constexpr (kWarps > 1) {
      __syncthreads();
      if (thread % 32 == 0) sums[thread / 32] = sum;
      __syncthreads();
      sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += sums[i];
    }
    const float factor = 1.0f / sqrtf(sum / static_cast<float>(job.width) + job.eps);
    if (!there) break;
    for (int64_t c = thread * kV; c < job.width; c += kThreads * kV) {
      float v[kV], w[kV];
      to_floats<E>(load_part(x + c, job.width - c, aligned_x), v);
      to_floats<E>(load_part(weight + c, job.width - c, aligned_weight), w);
#pragma unroll
      for (int i = 0; i < kV; ++i) v[i] = w[i] * widened(rounded<E>(v[i] * factor));
      store_part(y + c, v, job.width - c, aligned_y);
    }
  }
}

template <class E>
cudaError_t run(const RmsNorm& job, cudaStream_t stream) {
  const bool narrow = job.width <= kNarrow;
  const int64_t wanted = narrow ? (job.rows + kRowsPerBlock - 1) / kRowsPerBlock : job.rows;
  const auto blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
  if (narrow) return launch(rms_norm_kernel<E, 1>, blocks, kRowsPerBlock * 32, 0, stream, job);
  return launch(rms_norm_kernel<E, kWideWarps>, blocks, kWideWarps * 32, 0, stream, job);
}

}  // namespace

int rms_norm(const RmsNorm& job, int device, void* stream) {
  // The static runtime keeps its own current device, which torch's does not set.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || job.rows == 0 || job.width == 0) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (job.dtype) {
    case Dtype::bf16: return run<__nv_bfloat16>(job, s);
    case Dtype::f16: return run<__half>(job, s);
    default: return run<float>(job, s);
  }
}

}  // namespace ppnet::cuda
