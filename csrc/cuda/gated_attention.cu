// Fused attention, forward: a block takes a block of queries of one head through the keys they attend to, with the
// softmax kept up as it goes along.
#include "attention_tiles.h"

namespace ppnet::cuda {
namespace {

// 32 rows of queries to a warp halve what is read of keys and values from shared memory, where the sums leave registers
// for it. Shared memory: 36 KB at width 64, 52 KB at 96, 68 KB at 128: two blocks to an SM of sm_80; 99 KB at 256, all
// that sm_89 and sm_120 have.
template <int kWidth, bool kMasked>
struct Forward {
  static constexpr int kRowTiles = kWidth <= 128 && !kMasked ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kQueries = kWarps * kWarpRows;
  static constexpr int kKeys = 64;
  static constexpr size_t kShared = (kQueries + 2 * kKeys) * kStride<kWidth> * 2;
};

// Of every row: its largest score so far, and this lane's part of the sum of 2^(score - largest).
template <int kRowTiles>
struct Softmax {
  float largest[kRowTiles][2], total[kRowTiles][2];
};

// Turns scores into weights, and scales what was summed before to their common base.
template <int kRowTiles, int kKeyTiles, int kOutTiles>
__device__ __forceinline__ void soften(float (&score)[kRowTiles][kKeyTiles][4], Softmax<kRowTiles>& softmax,
                                       float (&sum)[kRowTiles][kOutTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = softmax.largest[r][half];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
        largest = fmaxf(largest, fmaxf(score[r][n][2 * half], score[r][n][2 * half + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const float base = largest == -INFINITY ? 0 : largest;  // nothing yet: every weight is 2^-inf
      const float factor = exp2_approx(softmax.largest[r][half] - base);
      float total = softmax.total[r][half] * factor;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          score[r][n][e] = exp2_approx(score[r][n][e] - base);
          total += score[r][n][e];
        }
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        sum[r][n][2 * half] *= factor;
        sum[r][n][2 * half + 1] *= factor;
      }
      softmax.largest[r][half] = largest;
      softmax.total[r][half] = total;
    }
}

template <class T, int kWidth, bool kMasked>
__global__ void __launch_bounds__(kThreads, 2) gated_attention_kernel(const __grid_constant__ GatedAttention p) {
  using F = Forward<kWidth, kMasked>;
  constexpr int kRowTiles = F::kRowTiles, kKeys = F::kKeys;
  T* const queries = dynamic_shared<T>();
  T* const keys = queries + F::kQueries * kStride<kWidth>;
  T* const values = keys + kKeys * kStride<kWidth>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Under a causal rule later queries have more to do: they come first.
  const unsigned blocks = (p.tokens + F::kQueries - 1) / F::kQueries;
  const int first = static_cast<int>(blocks - 1 - blockIdx.x % blocks) * F::kQueries;
  const int64_t h = blockIdx.x / blocks % p.heads, b = blockIdx.x / blocks / p.heads;
  const int64_t k = h / p.per_group, group = kv_head(p, k);
  const int row = first + warp * F::kWarpRows;  // the warp's first
  T* const own = queries + warp * F::kWarpRows * kStride<kWidth>;

  const Span span = keys_of(p, first, min(first + F::kQueries, p.tokens) - 1);
  const auto wanted = [&](int s) { return s >= span.begin && s < span.end && is_used<kMasked>(p, b, s); };
  const T* const key = rows_of<const T>(p.key, b, group);
  const T* const value = rows_of<const T>(p.value, b, group);
  const auto load = [&](T* tile, const T* from, int64_t stride, int s) {
    load_rows<kWidth, kKeys>(tile, from, stride, s, p.width, wanted);
    cp_async_commit();
  };

  float sum[kRowTiles][kWidth / 8][4] = {};
  Softmax<kRowTiles> softmax;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) softmax.largest[r][half] = -INFINITY, softmax.total[r][half] = 0;

  int s = span.begin / kKeys * kKeys;
  if (s < span.end) {
    load_rows<kWidth, F::kQueries>(queries, rows_of<const T>(p.query, b, h), p.query.row, first, p.width,
                                   [&](int t) { return t < p.tokens; });
    load(keys, key, p.key.row, s);
  }
  for (; s < span.end; s += kKeys) {
    cp_async_wait_all();
    __syncthreads();  // the keys are there; nobody reads the last values any more
    load(values, value, p.value.row, s);
    float score[kRowTiles][kKeys / 8][4] = {};
    multiply_rows<T, kWidth>(score, own, keys);
    apply_rules<false, kMasked>(score, p, whole(p, first, F::kQueries, s, kKeys), b, h, row, s);
    soften(score, softmax, sum);
    uint32_t weights[kRowTiles][kKeys / 8][2];
    pack_tiles<T>(weights, score);
    cp_async_wait_all();
    __syncthreads();  // the values are there; nobody reads these keys any more
    if (s + kKeys < span.end) load(keys, key, p.key.row, s + kKeys);
    multiply_columns<T, kWidth>(sum, weights, values);
  }

  const float gate = p.gate ? p.gate[k] : 1;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = sum_of_quad(softmax.total[r][half]);
      const int t = row + 16 * r + 8 * half + lane / 4;
      if (lane % 4 == 0 && t < p.tokens)
        p.lse[(b * p.heads + h) * p.tokens + t] =
            total == 0 ? -INFINITY : softmax.largest[r][half] * kLn2 + logf(total);
      softmax.total[r][half] = total == 0 ? 0 : gate / total;
    }
  __syncwarp();  // other lanes have read the last queries
  round_rows<kWidth>(own, sum, [&](int r, int half) { return softmax.total[r][half]; });
  T* const out = rows_of<T>(p.out, b, h) + row * p.out.row;
  store_rows<kWidth, kRowTiles>(out, p.out.row, own, p.tokens - row, p.width);
}

}  // namespace

int gated_attention(const GatedAttention& p, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  return for_case(p, [&](auto kind) {
    using C = decltype(kind);
    using F = Forward<C::kWidth, C::kMasked>;
    return launch_blocks(gated_attention_kernel<typename C::T, C::kWidth, C::kMasked>,
                         p.batch * p.heads * ceil_div(p.tokens, F::kQueries), kThreads, F::kShared,
                         static_cast<cudaStream_t>(stream), p);
  });
}

}  // namespace ppnet::cuda
