// linear_decode and linears_decode: dot products of kept rows with a few tokens, all layers in one launch.
//
// A warp reads whole rows, several at a time, 16 bytes per lane and load; x lies in shared memory in its own dtype.
#include "decode_kernels.h"

namespace ppnet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTable = 56;                 // layers of a launch: kernel parameters hold 4 KB
constexpr int64_t kTileBytes = 96 * 1024;  // of x: an sm_120 has 99 KB, an H200 room for two blocks

// Rows of a warp share what is read of x; a lane has eight 16-byte loads in flight: with 24 warps on a multiprocessor
// 96 KB, where an H200 needs about 26 KB (4.3 TB/s for 800 ns) if they never paused. Eight tokens leave registers for
// four, and are bound by arithmetic.
template <int kTokens>
inline constexpr int kRows = kTokens <= 4 ? 2 : 4;
template <int kTokens>
inline constexpr int kAhead = kTokens == 8 ? 1 : 8 / kRows<kTokens>;
template <int kTokens>
inline constexpr int kBlocksPerSm = kTokens == 1 ? 3 : 2;

struct Table {
  DecodeLayer layers[kTable];
  int64_t group_end[kTable];
  const void* x;
  int64_t tokens, width, tile;
  int32_t n;
  bool float_y;
};
static_assert(sizeof(Table) <= 4096, "kernel parameters are limited to 4 KB");

// x[:, begin : begin + tile] in rows of `tile` elements, zeros after the last column and token.
template <class E, int kTokens>
__device__ void load_x(const Table& job, int64_t begin, E* xs) {
  const auto* x = static_cast<const E*>(job.x);
  const bool aligned = aligned_to(x) && job.width % kVector<E> == 0;
  const int64_t vectors = job.tile / kVector<E>;
  for (int64_t i = threadIdx.x; i < kTokens * vectors; i += kThreads) {
    const int64_t t = i / vectors, c = begin + i % vectors * kVector<E>;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (t < job.tokens && c < job.width) v = load_part(x + t * job.width + c, job.width - c, aligned);
    store16(xs + i * kVector<E>, v);
  }
}

// sums[r * kTokens + t] += rows[r][0 .. n) . x[t]. kWhole: every row is whole vectors, aligned to them.
template <class E, int kTokens, bool kWhole>
__device__ __forceinline__ void dots(const E* const* rows, int n, const E* xs, int tile, int lane, float* sums) {
  constexpr int kR = kRows<kTokens>, kU = kWhole ? kAhead<kTokens> : 1, kV = kVector<E>;
#pragma unroll 1
  for (int first = lane * kV; first < n; first += 32 * kU * kV) {
    uint4 w[kU][kR];
#pragma unroll
    for (int u = 0; u < kU; ++u) {
      const int c = first + u * 32 * kV;
#pragma unroll
      for (int r = 0; r < kR; ++r)
        if (c < n) w[u][r] = kWhole ? stream16(rows[r] + c) : load_some(rows[r] + c, n - c);
    }
#pragma unroll
    for (int u = 0; u < kU; ++u) {
      const int c = first + u * 32 * kV;
      if (c >= n) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // fewer floats at a time
        float weights[kR][kV / 2];
#pragma unroll
        for (int r = 0; r < kR; ++r)
          to_floats<E>(half ? make_uint2(w[u][r].z, w[u][r].w) : make_uint2(w[u][r].x, w[u][r].y), weights[r]);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          float x[kV / 2];
          to_floats<E>(*reinterpret_cast<const uint2*>(xs + t * tile + c + half * kV / 2), x);
#pragma unroll
          for (int r = 0; r < kR; ++r)
#pragma unroll
            for (int i = 0; i < kV / 2; ++i)
              sums[r * kTokens + t] = fmaf(weights[r][i], x[i], sums[r * kTokens + t]);
        }
      }
    }
  }
}

template <class E, int kTokens>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<kTokens>)
    linears_kernel(const __grid_constant__ Table job) {
  constexpr int kR = kRows<kTokens>;
  E* xs = dynamic_shared<E>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t groups = job.group_end[job.n - 1];
  bool loaded = false;
  for (int64_t g = blockIdx.x; g < groups; g += gridDim.x) {
    int l = 0;
    while (g >= job.group_end[l]) ++l;
    const DecodeLayer& layer = job.layers[l];
    const int64_t k = ((g - (l > 0 ? job.group_end[l - 1] : 0)) * kWarps + warp) * kR;
    const bool whole = aligned_to(layer.weight) && layer.stride % kVector<E> == 0 && job.width % kVector<E> == 0;
    const E* rows[kR];
#pragma unroll
    for (int r = 0; r < kR; ++r)  // past the end: the last row once more
      rows[r] = static_cast<const E*>(layer.weight) +
                row_of(layer.idx, min(k + r, layer.kept - 1), layer.rows) * layer.stride;
    float sums[kR * kTokens] = {};
    for (int64_t begin = 0; begin < job.width; begin += job.tile) {
      if (!loaded || job.tile < job.width) {
        __syncthreads();
        load_x<E, kTokens>(job, begin, xs);
        __syncthreads();
        loaded = true;
      }
      if (k >= layer.kept) continue;
      const int n = static_cast<int>(min(job.tile, job.width - begin)), tile = static_cast<int>(job.tile);
      if (whole) dots<E, kTokens, true>(rows, n, xs, tile, lane, sums);
      else dots<E, kTokens, false>(rows, n, xs, tile, lane, sums);
#pragma unroll
      for (int r = 0; r < kR; ++r) rows[r] += n;
    }
    // Lane l holds the sum of row and token l * kR * kTokens / 32.
    warp_sums<kR * kTokens>(sums);
    constexpr int kLanes = 32 / (kR * kTokens);
    const int r = lane / kLanes / kTokens, t = lane / kLanes % kTokens;
    if (lane % kLanes == 0 && k + r < layer.kept && t < job.tokens) {
      float y = sums[0];
      if (layer.bias) y += widened(static_cast<const E*>(layer.bias)[layer.idx ? layer.idx[k + r] : k + r]);
      const int64_t at = t * layer.kept + k + r;
      if (job.float_y) static_cast<float*>(layer.y)[at] = y;
      else static_cast<E*>(layer.y)[at] = rounded<E>(y);
    }
  }
}

int rows_per_warp(int64_t tokens) { return tokens <= 4 ? kRows<1> : kRows<8>; }

}  // namespace

int64_t linear_groups(int64_t kept, int rows_per_group) { return ceil_div(kept, rows_per_group); }

LinearPlan linear_plan(const LinearsDecode& job) {
  LinearPlan plan{};
  plan.threads = kThreads;
  plan.rows_per_warp = rows_per_warp(job.tokens);
  const int64_t bytes = element_size(job.dtype), tokens = padded_tokens(job.tokens);
  const int64_t most = kTileBytes / (tokens * bytes) / 256 * 256;  // whole turns of a warp
  const int64_t width = whole_pitch(job.width);
  plan.tile = width < most ? width : most;
  plan.tile_bytes = tokens * plan.tile * bytes;
  for (int64_t i = 0; i < job.n; ++i)
    plan.groups += linear_groups(job.layers[i].kept, kWarps * plan.rows_per_warp);
  const int64_t resident = kSms * (tokens == 1 ? kBlocksPerSm<1> : kBlocksPerSm<8>);
  plan.blocks = plan.groups < resident ? plan.groups : resident;
  return plan;
}

int linears_decode(const LinearsDecode& job, int device, void* stream) {
  // The static runtime keeps its own current device, which torch's does not set.
  cudaError_t error = cudaSetDevice(device);
  if (job.tokens == 0) return error;
  for (int64_t first = 0; first < job.n && error == cudaSuccess; first += kTable) {
    LinearsDecode part = job;
    part.layers = job.layers + first;
    part.n = job.n - first < kTable ? job.n - first : kTable;
    const LinearPlan plan = linear_plan(part);
    Table table{};
    int64_t groups = 0;
    for (int64_t i = 0; i < part.n; ++i) {
      groups += linear_groups(part.layers[i].kept, kWarps * plan.rows_per_warp);
      table.layers[i] = part.layers[i];
      table.group_end[i] = groups;
    }
    table.x = job.x;
    table.tokens = job.tokens;
    table.width = job.width;
    table.tile = plan.tile;
    table.n = static_cast<int32_t>(part.n);
    table.float_y = job.float_y;
    if (groups == 0) continue;
    error = with_kind(job.dtype, job.tokens, [&](auto kind) {
      using K = decltype(kind);
      return launch(linears_kernel<typename K::Element, K::kTokens>, static_cast<unsigned>(plan.blocks), kThreads,
                    static_cast<size_t>(plan.tile_bytes), static_cast<cudaStream_t>(stream), table);
    });
  }
  return error;
}

}  // namespace ppnet::cuda
