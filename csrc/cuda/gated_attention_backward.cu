// Fused attention, backward. A block takes queries through their keys for dquery, another keys through their queries
// for dkey and dvalue: weights are computed twice, but every sum has one owner and one order, without atomics.
//
//   w = 2^(score - lse)   dweight = dout · valueᵀ   D = rowsum(dout * out)   dscore = w * (gate * dweight - D)
//   dquery = scale * dscore · key   dkey = scale * dscoreᵀ · query   dvalue = (gate * w)ᵀ · dout
//   dgate = Σ rowsum(w * dweight) = Σ D / gate
#include "attention_tiles.h"

namespace ppnet::cuda {
namespace {

// Below, D / gate would lose digits that rounding took from a small out: the gradient is summed from the weights.
constexpr float kSmallGate = 0.0625f;

// Shared memory holds two tiles of rows, and two stages of two tiles of columns: 54 KB at width 64, 78 or 52 at 96, 68
// at 128, two blocks to an SM of sm_80; 99 KB at 256, all that sm_89 and sm_120 have: nothing else may stand there.
template <int kWidth, int kTiles>
struct Backward {
  static constexpr int kRowTiles = kTiles;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kColumns = kWidth > 128 ? 16 : 32;
  static constexpr int kTile = kColumns * kStride<kWidth>;
  static constexpr size_t kShared = (2 * kRows + 4 * kColumns) * kStride<kWidth> * 2;
};
template <int kWidth, bool kMasked>
using OfQueries = Backward<kWidth, kWidth <= 96 && !kMasked ? 2 : 1>;
template <int kWidth, bool kMasked>
using OfKeys = Backward<kWidth, kWidth <= 64 && !kMasked ? 2 : 1>;

// --- D, and lse to base 2 -------------------------------------------------------------------------------------------

constexpr int kRowThreads = 256;
constexpr int kRowLanes = 8;  // of a row: 128 bytes at a time

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    attention_rows_kernel(const __grid_constant__ GatedAttention p, const __grid_constant__ GatedAttentionGradients g) {
  const int64_t n = p.batch * p.heads * p.tokens;
  const int64_t row = int64_t(blockIdx.x) * (kRowThreads / kRowLanes) + threadIdx.x / kRowLanes;
  float sum = 0;
  if (row < n) {
    const int64_t t = row % p.tokens, h = row / p.tokens % p.heads, b = row / p.tokens / p.heads;
    const T* out = rows_of<const T>(p.out, b, h) + t * p.out.row;
    const T* dout = rows_of<const T>(g.dout, b, h) + t * g.dout.row;
    for (int c = threadIdx.x % kRowLanes * 8; c < p.width; c += kRowLanes * 8) {
      const uint4 x = *reinterpret_cast<const uint4*>(out + c), y = *reinterpret_cast<const uint4*>(dout + c);
      const uint32_t left[] = {x.x, x.y, x.z, x.w}, right[] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 u = unpack<T>(left[i]), v = unpack<T>(right[i]);
        sum += u.x * v.x + u.y * v.y;
      }
    }
  }
#pragma unroll
  for (int width = kRowLanes / 2; width > 0; width /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, width);
  if (row >= n || threadIdx.x % kRowLanes != 0) return;
  const float lse = p.lse[row];
  g.rows[row] = lse == -INFINITY ? 0 : lse * kLog2e;  // with scores of -inf its weights are 0
  g.rows[n + row] = sum;
}

// --- dquery, and the gate's gradient by block -----------------------------------------------------------------------

template <class T, int kWidth, bool kMasked>
__global__ void __launch_bounds__(kThreads, 2)
    attention_dquery_kernel(const __grid_constant__ GatedAttention p,
                            const __grid_constant__ GatedAttentionGradients g) {
  using F = OfQueries<kWidth, kMasked>;
  constexpr int kRowTiles = F::kRowTiles, kKeys = F::kColumns, kTile = F::kTile;
  T* const queries = dynamic_shared<T>();
  T* const douts = queries + F::kRows * kStride<kWidth>;
  T* const tiles = douts + F::kRows * kStride<kWidth>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned blocks = (p.tokens + F::kRows - 1) / F::kRows;
  const unsigned block = blocks - 1 - blockIdx.x % blocks;
  const int first = static_cast<int>(block) * F::kRows;
  const int64_t h = blockIdx.x / blocks % p.heads, b = blockIdx.x / blocks / p.heads;
  const int64_t k = h / p.per_group, group = kv_head(p, k), n = p.batch * p.heads * p.tokens;
  const int row = first + warp * F::kWarpRows;
  T* const own = queries + warp * F::kWarpRows * kStride<kWidth>;
  const T* const own_dout = douts + warp * F::kWarpRows * kStride<kWidth>;
  const float gate = p.gate ? p.gate[k] : 1;

  const Span span = keys_of(p, first, min(first + F::kRows, p.tokens) - 1);
  const auto wanted = [&](int s) { return s >= span.begin && s < span.end && is_used<kMasked>(p, b, s); };
  const T* const key = rows_of<const T>(p.key, b, group);
  const T* const value = rows_of<const T>(p.value, b, group);
  const auto load = [&](int s, int stage) {
    load_rows<kWidth, kKeys>(tiles + 2 * stage * kTile, key, p.key.row, s, p.width, wanted);
    load_rows<kWidth, kKeys>(tiles + (2 * stage + 1) * kTile, value, p.value.row, s, p.width, wanted);
    cp_async_commit();
  };

  float lse[kRowTiles][2], delta[kRowTiles][2], delta_sum = 0;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = row + 16 * r + 8 * half + lane / 4;
      const float* at = g.rows + (b * p.heads + h) * p.tokens + t;
      lse[r][half] = t < p.tokens ? at[0] : 0;
      delta[r][half] = t < p.tokens ? at[n] : 0;
      delta_sum += delta[r][half];
    }

  const bool from_weights = g.partial && fabsf(gate) < kSmallGate;
  float through = 0;
  float sum[kRowTiles][kWidth / 8][4] = {};
  int s = span.begin / kKeys * kKeys;
  if (s < span.end) {
    const auto inside = [&](int t) { return t < p.tokens; };
    load_rows<kWidth, F::kRows>(queries, rows_of<const T>(p.query, b, h), p.query.row, first, p.width, inside);
    load_rows<kWidth, F::kRows>(douts, rows_of<const T>(g.dout, b, h), g.dout.row, first, p.width, inside);
    load(s, 0);
  }
  for (int stage = 0; s < span.end; s += kKeys, stage ^= 1) {
    cp_async_wait_all();
    __syncthreads();  // this stage is there; nobody reads the other one any more
    if (s + kKeys < span.end) load(s + kKeys, stage ^ 1);
    const T* const keys = tiles + 2 * stage * kTile;
    float score[kRowTiles][kKeys / 8][4] = {}, dweight[kRowTiles][kKeys / 8][4] = {};
    multiply_rows<T, kWidth>(score, own, keys);
    multiply_rows<T, kWidth>(dweight, own_dout, keys + kTile);
    apply_rules<false, kMasked>(score, p, whole(p, first, F::kRows, s, kKeys), b, h, row, s);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float w = exp2_approx(score[r][i][e] - lse[r][e / 2]);
          // Rows after the last token have weights too, and 0 times a key of -inf is NaN.
          if (from_weights && row + 16 * r + 8 * (e / 2) + lane / 4 < p.tokens) through += w * dweight[r][i][e];
          score[r][i][e] = w * (gate * dweight[r][i][e] - delta[r][e / 2]);
        }
    uint32_t dscores[kRowTiles][kKeys / 8][2];
    pack_tiles<T>(dscores, score);
    multiply_columns<T, kWidth>(sum, dscores, keys);
  }

  __syncwarp();
  round_rows<kWidth>(own, sum, [&](int, int) { return p.scale; });
  T* const to = rows_of<T>(g.dquery, b, h) + row * g.dquery.row;
  store_rows<kWidth, kRowTiles>(to, g.dquery.row, own, p.tokens - row, p.width);

  if (!g.partial) return;
  // Four lanes have the same rows.
  float part = from_weights ? through : lane % 4 == 0 ? delta_sum / gate : 0;
#pragma unroll
  for (int width = 16; width > 0; width /= 2) part += __shfl_xor_sync(0xffffffffu, part, width);
  float* const warp_sums = reinterpret_cast<float*>(tiles);
  __syncthreads();  // nobody reads the tiles any more
  if (lane == 0) warp_sums[warp] = part;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += warp_sums[w];
    g.partial[(b * p.heads + h) * blocks + block] = total;
  }
}

// dgate[k]: a block sums what the blocks of its heads left, in a fixed order.
__global__ void __launch_bounds__(kThreads) attention_dgate_kernel(const __grid_constant__ GatedAttention p,
                                                                   const __grid_constant__ GatedAttentionGradients g,
                                                                   int64_t blocks) {
  __shared__ float warp_sums[kWarps];
  const int64_t per_sequence = p.per_group * blocks;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < p.batch * per_sequence; i += kThreads) {
    const int64_t b = i / per_sequence;
    sum += g.partial[(b * p.heads + blockIdx.x * p.per_group) * blocks + i % per_sequence];
  }
#pragma unroll
  for (int width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, width);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += warp_sums[w];
  g.dgate[blockIdx.x] = sum;
}

// --- dkey and dvalue ------------------------------------------------------------------------------------------------

enum class Wanted { both, dkey, dvalue };

// One block of keys of a KV head, through the queries of every head that uses it; a head that none uses gets zeros. At
// width 256 registers hold only one of the two sums: it takes two launches.
template <class T, int kWidth, bool kMasked, Wanted kWanted>
__global__ void __launch_bounds__(kThreads, 2)
    attention_dkey_kernel(const __grid_constant__ GatedAttention p, const __grid_constant__ GatedAttentionGradients g) {
  using F = OfKeys<kWidth, kMasked>;
  constexpr int kRowTiles = F::kRowTiles, kQueries = F::kColumns, kTile = F::kTile;
  // At a time: what the registers hold beside the sums without spills, on sm_100 too.
  constexpr int kPart = kRowTiles == 2 || (kWidth == 128 && kMasked) ? 16 : kQueries;
  constexpr bool kKey = kWanted != Wanted::dvalue, kValue = kWanted != Wanted::dkey;
  T* const keys = dynamic_shared<T>();
  T* const values = keys + F::kRows * kStride<kWidth>;
  T* const tiles = values + F::kRows * kStride<kWidth>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned blocks = (p.keys + F::kRows - 1) / F::kRows;
  const int first = static_cast<int>(blockIdx.x % blocks) * F::kRows;
  const int64_t group = blockIdx.x / blocks % p.kv_heads, b = blockIdx.x / blocks / p.kv_heads;
  const int64_t n = p.batch * p.heads * p.tokens;
  const int row = first + warp * F::kWarpRows;
  T* const own_key = keys + warp * F::kWarpRows * kStride<kWidth>;
  T* const own_value = values + warp * F::kWarpRows * kStride<kWidth>;

  const Span span = queries_of(p, first, min(first + F::kRows, p.keys) - 1);
  // lse and D of a query stand in the padding of its row and of its row of dout.
  const auto column = [&](int stage, int which, int i) {
    return reinterpret_cast<float*>(tiles + (2 * stage + which) * kTile + i * kStride<kWidth> + kWidth);
  };
  const auto load = [&](int64_t h, int t, int stage) {
    const auto inside = [&](int x) { return x < span.end; };
    load_rows<kWidth, kQueries>(tiles + 2 * stage * kTile, rows_of<const T>(p.query, b, h), p.query.row, t, p.width,
                                inside);
    load_rows<kWidth, kQueries>(tiles + (2 * stage + 1) * kTile, rows_of<const T>(g.dout, b, h), g.dout.row, t,
                                p.width, inside);
    if (threadIdx.x < 2 * kQueries) {
      const int which = threadIdx.x / kQueries, i = threadIdx.x % kQueries;
      const bool there = t + i < span.end;
      const float* from = g.rows + which * n + (b * p.heads + h) * p.tokens + t + i;
      cp_async<4>(column(stage, which, i), there ? from : g.rows, there ? 4 : 0);
    }
    cp_async_commit();
  };

  float dkey[kRowTiles][kWidth / 8][4] = {}, dvalue[kRowTiles][kWidth / 8][4] = {};
  if (span.begin < span.end) {
    const int seen = keys_of(p, 0, p.tokens - 1).begin;
    const auto wanted = [&](int s) { return s >= seen && s < p.keys && is_used<kMasked>(p, b, s); };
    load_rows<kWidth, F::kRows>(keys, rows_of<const T>(p.key, b, group), p.key.row, first, p.width, wanted);
    load_rows<kWidth, F::kRows>(values, rows_of<const T>(p.value, b, group), p.value.row, first, p.width, wanted);
  }
  const int64_t last = p.groups ? p.kept : group + 1;
  for (int64_t k = p.groups ? 0 : group; k < last && span.begin < span.end; ++k) {
    if (kv_head(p, k) != group) continue;
    const float gate = p.gate ? p.gate[k] : 1;
    const int64_t end = (k + 1) * p.per_group;
    int64_t h = k * p.per_group;
    __syncthreads();  // nobody reads the last tiles of another k any more
    if (h < end) load(h, span.begin, 0);
    for (int t = span.begin, stage = 0; h < end; stage ^= 1) {
      cp_async_wait_all();
      __syncthreads();  // this stage is there; nobody reads the other one any more
      const int next = t + kQueries < span.end ? t + kQueries : span.begin;
      const int64_t next_head = next == span.begin ? h + 1 : h;
      if (next_head < end) load(next_head, next, stage ^ 1);
      const T* const queries = tiles + 2 * stage * kTile;
      const T* const douts = queries + kTile;
      const auto lse = [&](int i) { return *column(stage, 0, lane % 4 * 2 + i); };
      const auto delta = [&](int i) { return *column(stage, 1, lane % 4 * 2 + i); };

#pragma unroll 1
      for (int c = 0; c < kQueries; c += kPart) {
        const int at = c * kStride<kWidth>;
        float weight[kRowTiles][kPart / 8][4] = {};
        multiply_rows<T, kWidth>(weight, own_key, queries + at);
        apply_rules<true, kMasked>(weight, p, whole(p, t + c, kPart, first, F::kRows), b, h, row, t + c);
        uint32_t packed[kRowTiles][kPart / 8][2];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int i = 0; i < kPart / 8; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) weight[r][i][e] = exp2_approx(weight[r][i][e] - lse(c + 8 * i + e % 2));
            packed[r][i][0] = pack<T>(weight[r][i][0] * gate, weight[r][i][1] * gate);
            packed[r][i][1] = pack<T>(weight[r][i][2] * gate, weight[r][i][3] * gate);
          }
        if constexpr (kValue) multiply_columns<T, kWidth>(dvalue, packed, douts + at);
        if constexpr (kKey) {
          float dweight[kRowTiles][kPart / 8][4] = {};
          multiply_rows<T, kWidth>(dweight, own_value, douts + at);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
            for (int i = 0; i < kPart / 8; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) weight[r][i][e] *= gate * dweight[r][i][e] - delta(c + 8 * i + e % 2);
          pack_tiles<T>(packed, weight);
          multiply_columns<T, kWidth>(dkey, packed, queries + at);
        }
      }
      t = next;
      h = next_head;
    }
  }

  cp_async_wait_all();
  __syncthreads();  // no copy arrives any more
  if constexpr (kKey) {
    round_rows<kWidth>(own_key, dkey, [&](int, int) { return p.scale; });
    T* const to = rows_of<T>(g.dkey, b, group) + row * g.dkey.row;
    store_rows<kWidth, kRowTiles>(to, g.dkey.row, own_key, p.keys - row, p.width);
  }
  if constexpr (kValue) {
    round_rows<kWidth>(own_value, dvalue, [&](int, int) { return 1.0f; });
    T* const to = rows_of<T>(g.dvalue, b, group) + row * g.dvalue.row;
    store_rows<kWidth, kRowTiles>(to, g.dvalue.row, own_value, p.keys - row, p.width);
  }
}

template <class C>
cudaError_t launch_dkey(const GatedAttention& p, const GatedAttentionGradients& g, cudaStream_t stream) {
  using F = OfKeys<C::kWidth, C::kMasked>;
  const int64_t blocks = p.batch * p.kv_heads * ceil_div(p.keys, F::kRows);
  const auto run = [&](auto kernel) { return launch_blocks(kernel, blocks, kThreads, F::kShared, stream, p, g); };
  if constexpr (C::kWidth <= 128) {
    return run(attention_dkey_kernel<typename C::T, C::kWidth, C::kMasked, Wanted::both>);
  } else {
    const cudaError_t error = run(attention_dkey_kernel<typename C::T, C::kWidth, C::kMasked, Wanted::dvalue>);
    if (error != cudaSuccess) return error;
    return run(attention_dkey_kernel<typename C::T, C::kWidth, C::kMasked, Wanted::dkey>);
  }
}

template <class C>
cudaError_t launch_backward(const GatedAttention& p, const GatedAttentionGradients& g, cudaStream_t stream) {
  using F = OfQueries<C::kWidth, C::kMasked>;
  const int64_t rows = p.batch * p.heads * p.tokens, blocks = ceil_div(p.tokens, F::kRows);
  cudaError_t error = launch_blocks(attention_rows_kernel<typename C::T>, ceil_div(rows, kRowThreads / kRowLanes),
                                    kRowThreads, 0, stream, p, g);
  if (error == cudaSuccess)
    error = launch_blocks(attention_dquery_kernel<typename C::T, C::kWidth, C::kMasked>, p.batch * p.heads * blocks,
                          kThreads, F::kShared, stream, p, g);
  if (error == cudaSuccess && g.dgate)
    error = launch_blocks(attention_dgate_kernel, p.kept, kThreads, 0, stream, p, g, blocks);
  if (error == cudaSuccess) error = launch_dkey<C>(p, g, stream);
  return error;
}

}  // namespace

int64_t gated_attention_partials(const GatedAttention& p) {
  int64_t rows = 0;
  for_case(p, [&](auto kind) {
    rows = OfQueries<decltype(kind)::kWidth, decltype(kind)::kMasked>::kRows;
    return cudaSuccess;
  });
  return p.batch * p.heads * ceil_div(p.tokens, rows);
}

int gated_attention_backward(const GatedAttention& p, const GatedAttentionGradients& g, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  return for_case(p, [&](auto kind) {
    return launch_backward<decltype(kind)>(p, g, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace ppnet::cuda
