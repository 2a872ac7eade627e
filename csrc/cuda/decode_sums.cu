// The second stage of the sums over kept rows: blocks left theirs in a workspace, mostly still in the L2 cache.
#include "decode_kernels.h"

namespace ppnet::cuda {
namespace {

// A block takes 32 columns of one token: D = 4096 fills the GPU. Its warps divide the chunks.
constexpr int kWarps = 8;

template <class E>
__global__ void __launch_bounds__(kWarps * 32)
    add_up_kernel(const float* partial, int64_t chunks, int64_t tokens, int64_t width, const E* bias,
                  const E* residual, E* y) {
  __shared__ float sums[kWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t d = int64_t(blockIdx.x) * 32 + lane, t = blockIdx.y, pitch = whole_pitch(width);
  float sum = 0.0f;
  if (d < width) {
    const float* from = partial + t * pitch + d;
#pragma unroll 8
    for (int64_t c = warp; c < chunks; c += kWarps) sum += from[c * tokens * pitch];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || d >= width) return;
  float total = bias ? widened(bias[d]) : 0.0f;
  if (residual) total += widened(residual[t * width + d]);
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += sums[i][lane];
  y[t * width + d] = rounded<E>(total);
}

template <class E>
cudaError_t run(const float* partial, int64_t chunks, int64_t tokens, int64_t width, const void* bias,
                const void* residual, void* y, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(width, 32)), static_cast<unsigned>(tokens));
  return launch(add_up_kernel<E>, grid, kWarps * 32, 0, stream, partial, chunks, tokens, width,
                static_cast<const E*>(bias), static_cast<const E*>(residual), static_cast<E*>(y));
}

}  // namespace

cudaError_t add_up(Dtype dtype, const float* partial, int64_t chunks, int64_t tokens, int64_t width, const void* bias,
                   const void* residual, void* y, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::bf16: return run<__nv_bfloat16>(partial, chunks, tokens, width, bias, residual, y, stream);
    case Dtype::f16: return run<__half>(partial, chunks, tokens, width, bias, residual, y, stream);
    default: return run<float>(partial, chunks, tokens, width, bias, residual, y, stream);
  }
}

}  // namespace ppnet::cuda
