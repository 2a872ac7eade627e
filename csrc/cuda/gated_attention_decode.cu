// gated_attention_decode: attention of a few new tokens over the kept KV groups of a cache, in two stages. Blocks take
// parts of a sequence's positions; where there are several parts, a second kernel adds them up in their order.
#include "gated_attention_decode.h"

#include "decode_scalar.h"
#include "decode_tensor.h"
#include "sizes.h"

namespace ppnet::cuda {
namespace {

constexpr int64_t kMostSplits = 128;
// The H200's 132 multiprocessors with two blocks each.
constexpr int64_t kBlocksAtOnce = 132 * 2;

// The parts with the least estimated time, in rounds of a block's loop: blocks run in waves, each starts up as long as
// one round takes, and adding up costs two more.
int64_t best_splits(int64_t blocks, int64_t keys, int64_t round) {
  const int64_t most = ceil_div(keys, round) < kMostSplits ? ceil_div(keys, round) : kMostSplits;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t rounds = ceil_div(keys, splits * round) + 1;
    const int64_t time = ceil_div(blocks * splits, kBlocksAtOnce) * rounds + (splits > 1 ? 2 : 0);
    if (time < least) best = splits, least = time;
  }
  return best;
}

bool even_rows(const void* data, const int64_t* stride, int64_t size) {
  return aligned_to(data) && stride[0] * size % 16 == 0 && stride[1] * size % 16 == 0 && stride[2] * size % 16 == 0;
}

// The parts of one query row, added up in their order; one block each.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_combine_kernel(const __grid_constant__ AttentionDecode job, const __grid_constant__ DecodePlan plan) {
  constexpr int kPieces = kDecodeWidth / 32;
  __shared__ float factor[kMostSplits], sums[kDecodeWarps][kDecodeWidth], share;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, splits = static_cast<int>(plan.splits);
  const int64_t rows = job.per_group * job.tokens, row = blockIdx.x % rows, pair = blockIdx.x / rows;
  const int64_t units = job.batch * job.groups * plan.splits * rows, first = pair * plan.splits * rows + row;
  const float* stats = job.partial + units * job.width;
  if (warp == 0) {
    float top = kNever;
    for (int s = lane; s < splits; s += 32) top = fmaxf(top, stats[2 * (first + s * rows)]);
    for (int bit = 16; bit > 0; bit /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, bit));
    float weights = 0;
    for (int s = lane; s < splits; s += 32) {
      const float most = stats[2 * (first + s * rows)];
      factor[s] = most == kNever ? 0.0f : expf(most - top);
      if (most != kNever) weights += factor[s] * stats[2 * (first + s * rows) + 1];
    }
    for (int bit = 16; bit > 0; bit /= 2) weights += __shfl_xor_sync(0xffffffffu, weights, bit);
    if (lane == 0) share = top == kNever ? 0.0f : (job.gate ? job.gate[pair % job.groups] : 1.0f) / weights;
  }
  __syncthreads();
  float sum[kPieces] = {};
#pragma unroll 4
  for (int s = warp; s < splits; s += kDecodeWarps) {
    const float* from = job.partial + (first + s * rows) * job.width;
#pragma unroll
    for (int c = 0; c < kPieces; ++c)
      if (32 * c + lane < job.width) sum[c] += factor[s] * from[32 * c + lane];
  }
#pragma unroll
  for (int c = 0; c < kPieces; ++c) sums[warp][32 * c + lane] = sum[c];
  __syncthreads();
  const int64_t head = pair % job.groups * job.per_group + row / job.tokens;
  const int64_t token = pair / job.groups * job.tokens + row % job.tokens;
  T* out = static_cast<T*>(job.out) + (token * job.groups * job.per_group + head) * job.width;
  for (int d = threadIdx.x; d < job.width; d += kDecodeThreads) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) total += sums[w][d];
    out[d] = rounded<T>(total * share);
  }
}

using Kernel = void (*)(AttentionDecode, DecodePlan);

template <class T>
cudaError_t run(Kernel attend, size_t shared_bytes, const AttentionDecode& job, const DecodePlan& plan,
                cudaStream_t stream) {
  const int64_t pairs = job.batch * job.groups;
  const auto blocks = static_cast<unsigned>(pairs * plan.row_tiles * plan.splits);
  const cudaError_t error = launch(attend, blocks, kDecodeThreads, shared_bytes, stream, job, plan);
  if (error != cudaSuccess || plan.splits == 1) return error;
  const auto rows = static_cast<unsigned>(pairs * job.per_group * job.tokens);
  return launch(decode_combine_kernel<T>, rows, kDecodeThreads, 0, stream, job, plan);
}

template <class T, int kDims>
cudaError_t run_tensor(const AttentionDecode& job, const DecodePlan& plan, cudaStream_t stream) {
  return run<T>(decode_tensor_kernel<T, kDims>, sizeof(TensorShared<kDims>), job, plan, stream);
}

template <class T, int kSize, int kPieces>
cudaError_t run_scalar(const AttentionDecode& job, const DecodePlan& plan, cudaStream_t stream) {
  return run<T>(decode_scalar_kernel<T, kSize, kPieces>, sizeof(DecodeSums<kScalarRows, 32 * kSize * kPieces>), job,
                plan, stream);
}

template <class T>
cudaError_t run_narrow(const AttentionDecode& job, const DecodePlan& plan, cudaStream_t stream) {
  if (!plan.tensor_cores) return run_scalar<T, 1, 8>(job, plan, stream);
  if (job.width <= 64) return run_tensor<T, 64>(job, plan, stream);
  if (job.width <= 128) return run_tensor<T, 128>(job, plan, stream);
  return run_tensor<T, 256>(job, plan, stream);
}

cudaError_t run_float(const AttentionDecode& job, const DecodePlan& plan, cudaStream_t stream) {
  if (!plan.vectors) return run_scalar<float, 1, 8>(job, plan, stream);
  return job.width <= 128 ? run_scalar<float, 4, 1>(job, plan, stream) : run_scalar<float, 4, 2>(job, plan, stream);
}

}  // namespace

DecodePlan decode_plan(const AttentionDecode& job) {
  const int64_t size = ppnet::element_size(job.dtype), rows = job.per_group * job.tokens;
  DecodePlan plan{};
  plan.vectors = job.width * size % 16 == 0 && even_rows(job.query, job.query_stride, size) &&
                 even_rows(job.key, job.key_stride, size) && even_rows(job.value, job.value_stride, size);
  plan.tensor_cores = plan.vectors && size == 2;
  plan.row_tiles = ceil_div(rows, plan.tensor_cores ? kTensorRows : kScalarRows);
  const int64_t round = kDecodeWarps * (plan.tensor_cores ? kTensorPositions : kScalarPositions);
  const int64_t attended = job.window > 0 && job.window < job.keys - job.tokens ? job.window + job.tokens : job.keys;
  plan.splits = best_splits(job.batch * job.groups * plan.row_tiles, attended, round);
  if (plan.splits > 1) plan.partial = job.batch * job.groups * plan.splits * rows * (job.width + 2);
  return plan;
}

int gated_attention_decode(const AttentionDecode& job, int device, void* stream) {
  // The static runtime keeps its own current device, which torch's does not set.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  const DecodePlan plan = decode_plan(job);
  if (job.dtype == ppnet::Dtype::bf16) return run_narrow<__nv_bfloat16>(job, plan, s);
  if (job.dtype == ppnet::Dtype::f16) return run_narrow<__half>(job, plan, s);
  return run_float(job, plan, s);
}

}  // namespace ppnet::cuda
