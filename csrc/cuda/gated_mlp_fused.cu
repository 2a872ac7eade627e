// gated_mlp_fused: two matrix products over a list of neurons, whose weights are gathered by the copies to shared memory.
#include "gated_mlp_fused.h"

#include "activations.h"
#include "elements.h"
#include "gemm_tiles.h"

namespace ppnet::cuda {
namespace {

// 60 KB to 96 KB of shared memory, and up to 4 KB of lists: two or three blocks on an SM of an H200, one on any other GPU (99 KB).
using Tile32 = Tile<32, 64, 5, 3>;
using Tile64 = Tile<64, 128, 3, 3>;
using Tile128 = Tile<128, 128, 3, 2>;

constexpr int kSumThreads = 256;

// --- plan ---------------------------------------------------------------------------------------------------------------

// The time of a tile, by its traffic with shared memory, which moves 128 bytes per cycle: for 16 values of the inner
// dimension every warp reads its rows and columns, and the block writes its own.
struct TileCost {
  MlpTile tile;
  int64_t rows, cols, cycles;  // for kDepth values
};
constexpr TileCost cost_of(MlpTile tile, int64_t rows, int64_t cols) {
  return {tile, rows, cols, kDepth * 2 * (4 * (rows / 2 + cols / 2) + rows + cols) / 128};
}
constexpr TileCost kTiles[] = {cost_of(MlpTile::t32x64, 32, 64), cost_of(MlpTile::t64x128, 64, 128),
                               cost_of(MlpTile::t128x128, 128, 128)};
constexpr int64_t kSms = 132;            // H200
constexpr int64_t kFillCycles = 1500;    // until the first stage is there, and to write the results
constexpr int64_t kLaunchCycles = 4000;  // another kernel
constexpr int64_t kL2Bytes = 4000;       // per cycle
constexpr int64_t kMostSplits = 16;

constexpr int64_t cycles(const TileCost& tile, int64_t rows, int64_t cols, int64_t depth, int64_t splits) {
  const int64_t tiles = ceil_div(rows, tile.rows) * ceil_div(cols, tile.cols) * splits;
  const int64_t steps = ceil_div(ceil_div(depth, kDepth), splits);
  const int64_t sum = splits > 1 ? kLaunchCycles + 2 * 4 * splits * rows * cols / kL2Bytes : 0;
  return ceil_div(tiles, kSms) * (steps * tile.cycles + kFillCycles) + sum;
}

// --- kernels ------------------------------------------------------------------------------------------------------------

// The n-th kept neuron.
__device__ inline int64_t unit_of(const GatedMlp& job, int n) { return job.idx ? job.idx[n] : n; }

// A tile of h. The right operand's rows are those of up and, for every warp behind its own of up, those of gate, so that
// both pre-activations of a neuron are sums of one warp.
template <class T, class Tile, bool kGated, bool kVector>
__global__ void __launch_bounds__(kTileThreads, Tile::kBlocks) hidden_kernel(const __grid_constant__ GatedMlp job) {
  constexpr int kProducts = kGated ? 2 : 1, kNeurons = Tile::kCols / kProducts, kOfWarp = kNeurons / 2;
  T* shared = dynamic_shared<T>();
  // Tiles of the same neurons are neighbours: their weights come from the L2 cache but once.
  const unsigned row_tiles = (job.tokens + Tile::kRows - 1) / Tile::kRows;
  const int row = blockIdx.x % row_tiles * Tile::kRows, neuron = blockIdx.x / row_tiles * kNeurons;

  // The neurons' rows, in shared memory: in registers they would displace the sums.
  __shared__ const T* weights[kNeurons][kProducts];
  for (int i = threadIdx.x; i < kNeurons; i += kTileThreads) {
    const bool kept = neuron + i < job.kept;
    const int64_t f = kept ? unit_of(job, neuron + i) : 0;
    assert((!kept || !job.idx || (f >= 0 && f < job.units)) && "gated_mlp_fused: idx out of range");
    weights[i][0] = static_cast<const T*>(job.up) + f * job.up_stride;
    if constexpr (kGated) weights[i][1] = static_cast<const T*>(job.gate) + f * job.gate_stride;
  }
  __syncthreads();

  RowCopies<Tile::kRows, kVector, T> x(static_cast<const T*>(job.x), job.x_stride, row, job.tokens, 0, job.width);
  const auto load = [&](T* to, int step) {
    x.start(to);
    to += Tile::kRows * kDepth;
    const int chunk = threadIdx.x % 8, column = step * kDepth + chunk * kChunk, left = in_chunk(job.width - column);
#pragma unroll
    for (int i = 0; i < kNeurons / kRowsAtOnce; ++i) {
      const int n = threadIdx.x / 8 + i * kRowsAtOnce;
      const int local = n / kOfWarp * (kProducts * kOfWarp) + n % kOfWarp;
#pragma unroll
      for (int p = 0; p < kProducts; ++p)
        copy_chunk<kVector>(to + swizzled(local + p * kOfWarp, chunk), weights[n][p] + column,
                            neuron + n < job.kept ? left : 0, weights[n][p]);
    }
  };
  Sums<Tile> sums{};
  multiply<Tile, false>(sums, shared, (job.width + kDepth - 1) / kDepth, load);

  float* staged = reinterpret_cast<float*>(shared);
  stage_sums<Tile>(staged, sums);
  // 8 neurons to a thread, whose biases and gates it keeps, and 16 bytes of h for each of its tokens.
  constexpr int kGroups = kNeurons / kChunk;
  const int local = threadIdx.x % kGroups * kChunk, first = neuron + local;
  if (first >= job.kept) return;
  float up_bias[kChunk], gate_bias[kChunk], z[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int n = first + i;
    up_bias[i] = gate_bias[i] = 0;
    z[i] = 1;
    if (n >= job.kept) continue;
    const int64_t f = unit_of(job, n);
    if (job.up_bias) up_bias[i] = widened(static_cast<const T*>(job.up_bias)[f]);
    if (kGated && job.gate_bias) gate_bias[i] = widened(static_cast<const T*>(job.gate_bias)[f]);
    if (job.z) z[i] = job.z[n];
  }
  const int column = local / kOfWarp * (kProducts * kOfWarp) + local % kOfWarp;
#pragma unroll 1
  for (int r = threadIdx.x / kGroups; r < Tile::kRows && row + r < job.tokens; r += kTileThreads / kGroups) {
    const float* u = staged + r * Tile::kPitch + column;
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) {
      float h[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float up = u[i + j] + up_bias[i + j];
        h[j] = kGated ? activate<true>(job.act, u[i + j + kOfWarp] + gate_bias[i + j]) * up : activate<true>(job.act, up);
        if (job.z) h[j] *= z[i + j];
      }
      bits[i / 2] = pack<T>(h[0], h[1]);
    }
    T* out = static_cast<T*>(job.h) + (row + r) * job.h_stride + first;
    *reinterpret_cast<uint4*>(out) = make_uint4(bits[0], bits[1], bits[2], bits[3]);
  }
}

// A tile of y, or of one part of its sum. The right operand's rows are neurons.
template <class T, class Tile, bool kVector>
__global__ void __launch_bounds__(kTileThreads, Tile::kBlocks) down_kernel(const __grid_constant__ GatedMlp job) {
  T* shared = dynamic_shared<T>();
  const unsigned row_tiles = (job.tokens + Tile::kRows - 1) / Tile::kRows;
  const unsigned col_tiles = (job.out_width + Tile::kCols - 1) / Tile::kCols;
  const int row = blockIdx.x % row_tiles * Tile::kRows, col = blockIdx.x / row_tiles % col_tiles * Tile::kCols;
  const int split = blockIdx.x / row_tiles / col_tiles;
  const int64_t all = (job.kept + kDepth - 1) / kDepth;
  const int begin = static_cast<int>(all * split / job.plan.splits);
  const int steps = static_cast<int>(all * (split + 1) / job.plan.splits) - begin;

  // The neurons of the next steps, by asynchronous copies too. Those that load(step) starts to copy have arrived when they
  // are used, kStages - 1 steps later: multiply has waited for that step's copies by then.
  constexpr int kAhead = Tile::kStages - 1, kSteps = 2 * kAhead;
  __shared__ int64_t units[kSteps][kDepth];
  if (job.idx)
    for (int i = threadIdx.x; i < kAhead * kDepth; i += kTileThreads) {
      const int n = begin * kDepth + i;
      units[i / kDepth][i % kDepth] = n < job.kept ? job.idx[n] : 0;
    }
  __syncthreads();

  RowCopies<Tile::kRows, true, T> h(static_cast<const T*>(job.h), job.h_stride, row, job.tokens, begin * kDepth,
                                    job.kept);
  const auto load = [&](T* to, int step) {
    h.start(to);
    to += Tile::kRows * kDepth;
    const int r = threadIdx.x / 8, chunk = threadIdx.x % 8, first = (begin + step) * kDepth;
    const int next = first + kAhead * kDepth + threadIdx.x;
    if (job.idx && threadIdx.x < kDepth)
      cp_async<8>(&units[(step + kAhead) % kSteps][threadIdx.x], next < job.kept ? job.idx + next : job.idx,
                  next < job.kept ? 8 : 0);
#pragma unroll
    for (int i = 0; i < kDepth / kRowsAtOnce; ++i) {
      const int n = first + r + i * kRowsAtOnce;
      const int64_t f = !job.idx ? min(n, job.kept - 1) : units[step % kSteps][r + i * kRowsAtOnce];
      const T* from = static_cast<const T*>(job.down) + f * job.down_stride + col + chunk * kChunk;
      const int left = n < job.kept ? job.out_width - col - chunk * kChunk : 0;
#pragma unroll
      for (int panel = 0; panel < Tile::kCols / kDepth; ++panel)
        copy_chunk<kVector>(to + panel * (kDepth * kDepth) + swizzled(r + i * kRowsAtOnce, chunk), from + panel * kDepth,
                            in_chunk(left - panel * kDepth), static_cast<const T*>(job.down));
    }
  };
  Sums<Tile> sums{};
  multiply<Tile, true>(sums, shared, steps, load);

  float* staged = reinterpret_cast<float*>(shared);
  stage_sums<Tile>(staged, sums);
  constexpr int kGroups = Tile::kCols / kChunk;
  const int local = threadIdx.x % kGroups * kChunk, first = col + local;
  if (first >= job.out_width) return;
  const bool whole = job.plan.splits == 1, aligned = job.out_width % kChunk == 0;
  const T* bias = static_cast<const T*>(job.down_bias);
#pragma unroll 1
  for (int r = threadIdx.x / kGroups; r < Tile::kRows && row + r < job.tokens; r += kTileThreads / kGroups) {
    const float4* from = reinterpret_cast<const float4*>(staged + r * Tile::kPitch + local);
    const int64_t token = row + r;
    if (!whole) {
      float4* to = reinterpret_cast<float4*>(job.partial + (split * int64_t{job.tokens} + token) * job.partial_stride +
                                             first);
      to[0] = from[0];
      to[1] = from[1];
      continue;
    }
    float v[kChunk] = {from[0].x, from[0].y, from[0].z, from[0].w, from[1].x, from[1].y, from[1].z, from[1].w};
    T* y = static_cast<T*>(job.y) + token * job.out_width + first;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (bias && first + i < job.out_width) v[i] += widened(bias[first + i]);
    if (aligned) {
      *reinterpret_cast<uint4*>(y) =
          make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
      continue;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (first + i < job.out_width) y[i] = rounded<T>(v[i]);
  }
}

// y = the sum of its parts, in their order, and the bias: 4 columns to a thread.
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ GatedMlp job) {
  const int64_t groups = (job.out_width + 3) / 4, n = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  if (n >= job.tokens * groups) return;
  const int64_t token = n / groups;
  const int first = static_cast<int>(n % groups) * 4;
  float v[4] = {0, 0, 0, 0};
#pragma unroll 4
  for (int s = 0; s < job.plan.splits; ++s) {
    const float4 part = *reinterpret_cast<const float4*>(
        job.partial + (s * int64_t{job.tokens} + token) * job.partial_stride + first);
    v[0] += part.x;
    v[1] += part.y;
    v[2] += part.z;
    v[3] += part.w;
  }
  const T* bias = static_cast<const T*>(job.down_bias);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (bias && first + i < job.out_width) v[i] += widened(bias[first + i]);
  T* y = static_cast<T*>(job.y) + token * job.out_width + first;
  if (job.out_width % 4 == 0) {
    *reinterpret_cast<uint2*>(y) = make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (first + i < job.out_width) y[i] = rounded<T>(v[i]);
}

// --- launch -------------------------------------------------------------------------------------------------------------

bool rows_aligned(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kChunk == 0;
}

template <class Tile>
int64_t tiles(int64_t rows, int64_t cols) {
  return ceil_div(rows, Tile::kRows) * ceil_div(cols, Tile::kCols);
}

cudaError_t launch_tiles(void (*kernel)(GatedMlp), int64_t blocks, int shared_bytes, const GatedMlp& job,
                         cudaStream_t stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(kernel, static_cast<unsigned>(blocks), kTileThreads, static_cast<size_t>(shared_bytes), stream, job);
}

template <class T, class Tile, bool kVector>
cudaError_t hidden(const GatedMlp& job, cudaStream_t stream) {
  const int64_t blocks = tiles<Tile>(job.tokens, int64_t{job.kept} * (job.gated ? 2 : 1));
  const auto kernel = job.gated ? hidden_kernel<T, Tile, true, kVector> : hidden_kernel<T, Tile, false, kVector>;
  return launch_tiles(kernel, blocks, Tile::kSharedBytes, job, stream);
}

template <class T, class Tile, bool kVector>
cudaError_t down(const GatedMlp& job, cudaStream_t stream) {
  const int64_t blocks = tiles<Tile>(job.tokens, job.out_width) * job.plan.splits;
  return launch_tiles(down_kernel<T, Tile, kVector>, blocks, Tile::kSharedBytes, job, stream);
}

template <class T>
cudaError_t sum(const GatedMlp& job, cudaStream_t stream) {
  const int64_t blocks = ceil_div(job.tokens * ceil_div(job.out_width, 4), kSumThreads);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(sum_kernel<T>, static_cast<unsigned>(blocks), kSumThreads, 0, stream, job);
}

template <class T>
cudaError_t run(const GatedMlp& job, cudaStream_t stream) {
  if (job.plan.splits == 0) return sum<T>(job, stream);
  cudaError_t error;
  if (!rows_aligned(job.x, job.x_stride) || !rows_aligned(job.up, job.up_stride) ||
      (job.gated && !rows_aligned(job.gate, job.gate_stride)))
    error = hidden<T, Tile32, false>(job, stream);
  else if (job.plan.hidden == MlpTile::t32x64) error = hidden<T, Tile32, true>(job, stream);
  else if (job.plan.hidden == MlpTile::t64x128) error = hidden<T, Tile64, true>(job, stream);
  else error = hidden<T, Tile128, true>(job, stream);
  if (error != cudaSuccess) return error;
  if (!rows_aligned(job.down, job.down_stride)) error = down<T, Tile32, false>(job, stream);
  else if (job.plan.down == MlpTile::t32x64) error = down<T, Tile32, true>(job, stream);
  else if (job.plan.down == MlpTile::t64x128) error = down<T, Tile64, true>(job, stream);
  else error = down<T, Tile128, true>(job, stream);
  if (error != cudaSuccess || job.plan.splits == 1) return error;
  return sum<T>(job, stream);
}

}  // namespace

MlpPlan gated_mlp_plan(int64_t tokens, int64_t width, int64_t out_width, int64_t kept, bool gated) {
  MlpPlan plan{MlpTile::t32x64, MlpTile::t32x64, kept > 0 ? 1 : 0};
  const int64_t columns = kept * (gated ? 2 : 1), most = ceil_div(kept, kDepth) < kMostSplits ? ceil_div(kept, kDepth) : kMostSplits;
  int64_t best_hidden = INT64_MAX, best_down = INT64_MAX;
  // Of equally fast ones the largest tile with the fewest splits: it reads least.
  for (const TileCost& tile : kTiles) {
    const int64_t time = cycles(tile, tokens, columns, width, 1);
    if (time <= best_hidden) {
      best_hidden = time;
      plan.hidden = tile.tile;
    }
    for (int64_t splits = 1; splits <= most; ++splits) {
      const int64_t with = cycles(tile, tokens, out_width, kept, splits);
      if (with < best_down || (with == best_down && splits == 1)) {
        best_down = with;
        plan.down = tile.tile;
        plan.splits = static_cast<int32_t>(splits);
      }
    }
  }
  return plan;
}

int gated_mlp_fused(const GatedMlp& job, int device, void* stream) {
  // The static runtime keeps its own current device, which torch's does not set.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || job.tokens == 0 || job.out_width == 0) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  return job.dtype == Dtype::bf16 ? run<__nv_bfloat16>(job, s) : run<__half>(job, s);
}

}  // namespace ppnet::cuda
