// linear_t_decode: the sum of kept rows times a few tokens' factors. A block adds up some rows of a strip of columns,
// its warps different rows of them; decode_sums.cu adds up the blocks of a strip.
#include "activations.h"
#include "decode_kernels.h"

namespace ppnet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 256;  // whose places and factors lie in shared memory at a time

// 16-byte loads of a lane in flight; a lane holds the sums of a vector of columns for every token.
template <int kTokens>
inline constexpr int kAhead = kTokens <= 2 ? 8 : 4;
template <int kTokens>
inline constexpr int kBlocksPerSm = kTokens <= 2 ? 3 : 2;

int64_t strip(Dtype dtype) { return 32 * 16 / element_size(dtype); }  // columns

// The factor of row k for a token.
template <class E>
__device__ float factor(const LinearTDecode& job, int64_t t, int64_t k) {
  const int64_t at = t * job.kept + k;
  float x;
  if (!job.up) x = widened(static_cast<const E*>(job.x)[at]);
  else if (job.gate) x = activate<false>(job.act, job.gate[at]) * job.up[at];
  else x = activate<false>(job.act, job.up[at]);
  return job.z ? x * job.z[k] : x;
}

template <class E, int kTokens>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<kTokens>)
    linear_t_kernel(const __grid_constant__ LinearTDecode job) {
  constexpr int kV = kVector<E>, kU = kAhead<kTokens>, kStrip = 32 * kV;
  __shared__ int64_t places[kRows];
  __shared__ float factors[kRows][kTokens];
  __shared__ float sums[kWarps][kStrip];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t d = int64_t(blockIdx.x) * kStrip + lane * kV, left = job.width - d;
  const bool whole = aligned_to(job.weight) && job.stride % kV == 0 && left >= kV;
  const E* weight = static_cast<const E*>(job.weight) + d;
  const int64_t end = chunk_begin(job.kept, job.chunks, blockIdx.y + 1);
  float y[kTokens][kV] = {};
  for (int64_t first = chunk_begin(job.kept, job.chunks, blockIdx.y); first < end; first += kRows) {
    const int n = static_cast<int>(min(int64_t(kRows), end - first));
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < n) {
      places[threadIdx.x] = row_of(job.idx, first + threadIdx.x, job.rows) * job.stride;
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        factors[threadIdx.x][t] = t < job.tokens ? factor<E>(job, t, first + threadIdx.x) : 0.0f;
    }
    __syncthreads();
    if (left <= 0) continue;
#pragma unroll 1
    for (int i = warp; i < n; i += kWarps * kU) {
      uint4 w[kU];
#pragma unroll
      for (int u = 0; u < kU; ++u)
        if (i + u * kWarps < n) {
          const E* from = weight + places[i + u * kWarps];
          w[u] = whole ? stream16(from) : load_some(from, left < kV ? static_cast<int>(left) : kV);
        }
#pragma unroll
      for (int u = 0; u < kU; ++u) {
        if (i + u * kWarps >= n) break;
        float row[kV];
        to_floats<E>(w[u], row);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const float f = factors[i + u * kWarps][t];
#pragma unroll
          for (int j = 0; j < kV; ++j) y[t][j] = fmaf(row[j], f, y[t][j]);
        }
      }
    }
  }
  const int64_t pitch = whole_pitch(job.width), column = int64_t(blockIdx.x) * kStrip + threadIdx.x;
  float* partial = job.partial + int64_t(blockIdx.y) * job.tokens * pitch;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= job.tokens) break;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kV; ++j) sums[warp][j * 32 + lane] = y[t][j];
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < kStrip && column < job.width) {
      const int at = static_cast<int>(threadIdx.x) % kV * 32 + static_cast<int>(threadIdx.x) / kV;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += sums[i][at];
      partial[t * pitch + column] = sum;
    }
  }
}

}  // namespace

// As many blocks as an H200 runs at once, but at least 64 rows each: eight loads of every warp.
int64_t linear_t_chunks(Dtype dtype, int64_t tokens, int64_t width, int64_t kept) {
  const int64_t strips = ceil_div(width, strip(dtype));
  const int64_t wanted = kSms * (tokens <= 2 ? kBlocksPerSm<1> : kBlocksPerSm<8>) / (strips > 0 ? strips : 1);
  const int64_t most = ceil_div(kept, 64), chunks = wanted < most ? wanted : most;
  return chunks < 1 ? 1 : chunks;
}

int linear_t_decode(const LinearTDecode& job, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || job.tokens == 0 || job.width == 0) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(job.width, strip(job.dtype))),
                  static_cast<unsigned>(job.chunks));
  error = with_kind(job.dtype, job.tokens, [&](auto kind) {
    using K = decltype(kind);
    return launch(linear_t_kernel<typename K::Element, K::kTokens>, grid, kThreads, 0, s, job);
  });
  if (error != cudaSuccess) return error;
  return add_up(job.dtype, job.partial, job.chunks, job.tokens, job.width, job.bias, job.residual, job.y, s);
}

}  // namespace ppnet::cuda
