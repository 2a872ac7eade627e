// rotary: a thread turns 16 bytes of the first half of a head with those of the second.
#include "norms.h"

#include "vector.h"

namespace ppnet::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 6;  // up to 85 registers: without a bound, ptxas for sm_89 chose 63 and spilled
constexpr int64_t kMostBlocks = 1 << 20;

__host__ __device__ inline int64_t pieces(int64_t width, int64_t vector) { return (width / 2 + vector - 1) / vector; }

template <class E>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) rotary_kernel(const __grid_constant__ Rotary job, bool aligned) {
  constexpr int kV = kVector<E>;
  const int64_t half = job.width / 2, each = pieces(job.width, kV), heads = job.query.heads + job.key.heads;
  const int64_t all = job.batch * job.tokens * heads * each;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const int64_t c = i % each * kV, n = half - c, head = i / each % heads;
    const int64_t bt = i / each / heads, b = bt / job.tokens, t = bt % job.tokens;
    const bool is_query = head < job.query.heads;
    const RotaryHeads& of = is_query ? job.query : job.key;
    const int64_t h = is_query ? head : head - job.query.heads;
    const E* x = static_cast<const E*>(of.x) + b * of.batch_stride + h * of.head_stride + t * of.token_stride + c;
    E* y = static_cast<E*>(of.y) + (bt * of.heads + h) * job.width + c;
    const int64_t angle = b * job.angle_batch_stride + t * job.width + c;
    const E *cos = static_cast<const E*>(job.cos) + angle, *sin = static_cast<const E*>(job.sin) + angle;
    float low[kV], high[kV], cos_low[kV], cos_high[kV], sin_low[kV], sin_high[kV];
    to_floats<E>(load_part(x, n, aligned), low);
    to_floats<E>(load_part(x + half, n, aligned), high);
    to_floats<E>(load_part(cos, n, aligned), cos_low);
    to_floats<E>(load_part(cos + half, n, aligned), cos_high);
    to_floats<E>(load_part(sin, n, aligned), sin_low);
    to_floats<E>(load_part(sin + half, n, aligned), sin_high);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const float turned = low[j] * cos_low[j] - high[j] * sin_low[j];
      high[j] = high[j] * cos_high[j] + low[j] * sin_high[j];
      low[j] = turned;
    }
    store_part(y, low, n, aligned);
    store_part(y + half, high, n, aligned);
  }
}

bool aligned_heads(const RotaryHeads& heads, int64_t vector) {
  return aligned_to(heads.x) && aligned_to(heads.y) && heads.batch_stride % vector == 0 &&
         heads.head_stride % vector == 0 && heads.token_stride % vector == 0;
}

template <class E>
cudaError_t run(const Rotary& job, cudaStream_t stream) {
  const int64_t vector = kVector<E>;
  const bool aligned = job.width / 2 % vector == 0 && aligned_to(job.cos) && aligned_to(job.sin) &&
                       aligned_heads(job.query, vector) && aligned_heads(job.key, vector);
  const int64_t all =
      job.batch * job.tokens * (job.query.heads + job.key.heads) * pieces(job.width, vector);
  if (all == 0) return cudaSuccess;
  const int64_t blocks = (all + kThreads - 1) / kThreads;
  return launch(rotary_kernel<E>, static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0,
                stream, job, aligned);
}

}  // namespace

int rotary(const Rotary& job, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (job.dtype) {
    case Dtype::bf16: return run<__nv_bfloat16>(job, s);
    case Dtype::f16: return run<__half>(job, s);
    default: return run<float>(job, s);
  }
}

}  // namespace ppnet::cuda
