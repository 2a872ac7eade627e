// gated_mlp_decode: a whole MLP for a few tokens in one pass over its kept neurons, and the sum of what blocks found.
//
// A block takes a share of the kept neurons, a group at a time. A thread owns some columns: it copies those of the
// neurons' gate, up and down rows to shared memory, two groups ahead, and reads only what it copied itself; x and the
// sums of its columns stay in registers. The one barrier of a group is that of the dot products. So copies of a whole
// group are on their way at any time: 96 KB on a multiprocessor at D = 4096, where an H200 needs about 26 KB.
#include "activations.h"
#include "decode_kernels.h"

namespace ppnet::cuda {
namespace {

constexpr int kMostThreads = 512;      // one block of them per multiprocessor, or several smaller blocks
constexpr int kStages = 2;
constexpr int kMostValues = 16;        // dot products of a group; a lane for each
constexpr int64_t kShared = 200 * 1024;  // of the 227 KB that a block may have on an H200

template <class E, int kTokens, int kVectors, int kGroup, bool kGlu>
class Mlp {
 public:
  __device__ Mlp(const MlpDecode& job, int64_t chunks) : job_(job) {
    begin_ = chunk_begin(job.kept, chunks, blockIdx.x);
    end_ = chunk_begin(job.kept, chunks, blockIdx.x + 1);
    ring_ = dynamic_shared<unsigned char>();
    sums_ = reinterpret_cast<float*>(ring_ + int64_t(kStages) * kStageRows * kVectors * blockDim.x * 16);
    alignment_ = 16;
    narrow_alignment(job.up, job.up_stride);
    narrow_alignment(job.down, job.down_stride);
    if (kGlu) narrow_alignment(job.gate, job.gate_stride);
  }

  __device__ void run() {
    load_x();
    // Lane q * kTokens + t knows neuron q of a group. Rows are known a group before they are fetched.
    int64_t mine = place(begin_), next = place(begin_ + kGroup), after = place(begin_ + 2 * kGroup);
    fetch_dots(begin_, mine, 0);
    fetch_down(begin_, mine, 0);
    cp_async_commit();
    fetch_dots(begin_ + kGroup, next, 1);
    fetch_down(begin_ + kGroup, next, 1);
    cp_async_commit();
    int stage = 0;
    for (int64_t k = begin_; k < end_; k += kGroup) {
      const Scales scales = load_scales(k, mine);
      const int64_t later = place(k + 3 * kGroup);
      cp_async_wait<1>();
      float* sums = sums_ + stage * (static_cast<int>(blockDim.x) / 32) * kMostValues;
      dots(stage, sums);
      fetch_dots(k + 2 * kGroup, after, stage);
      __syncthreads();
      const float h = activation(sums, scales);
      axpy(k, stage, h);
      fetch_down(k + 2 * kGroup, after, stage);
      cp_async_commit();
      mine = next;
      next = after;
      after = later;
      stage ^= 1;
    }
    cp_async_wait_all();
    store();
  }

 private:
  static constexpr int kV = kVector<E>;
  static constexpr int kMatrices = kGlu ? 3 : 2;  // gate, up, down; or up, down
  static constexpr int kDots = kMatrices - 1;
  static constexpr int kStageRows = kMatrices * kGroup;
  static constexpr int kPairs = kGroup * kTokens;   // neurons and tokens of a group
  static constexpr int kValues = kDots * kPairs;    // dot products of a group
  static_assert(kValues <= kMostValues, "room for each");

  struct Scales {
    float z, up_bias, gate_bias;
  };

  __device__ void narrow_alignment(const void* p, int64_t stride) {
    while (alignment_ > 1 &&
           (!aligned_to(p, alignment_) || stride * int64_t(sizeof(E)) % alignment_ != 0))
      alignment_ /= 2;
  }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ int64_t column(int v) const { return (int64_t(v) * blockDim.x + threadIdx.x) * kV; }

  // The row of the lane's neuron of the group from k on.
  __device__ int64_t place(int64_t k) const {
    const int64_t own = k + lane() / kTokens;
    return lane() < kPairs && own < end_ ? row_of(job_.idx, own, job_.rows) : 0;
  }

  // Zeros for tokens and columns that are not there.
  __device__ void load_x() {
    const auto* x = static_cast<const E*>(job_.x);
    const bool aligned = aligned_to(x) && job_.width % kV == 0;
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (t < job_.tokens && column(v) < job_.width)
          bits = load_part(x + t * job_.width + column(v), job_.width - column(v), aligned);
        to_floats<E>(bits, x_[t][v]);
      }
  }

  // The thread's own 16 bytes of a row of a stage.
  __device__ unsigned char* slot(int stage, int row, int v) const {
    return ring_ + ((int64_t(stage) * kStageRows + row) * kVectors + v) * blockDim.x * 16 + threadIdx.x * 16;
  }

  // Columns that are not there are filled with zeros, because the dot products read them.
  __device__ void fetch(const void* matrix, int64_t stride, int64_t f, unsigned char* to, int v) const {
    const E* row = static_cast<const E*>(matrix) + f * stride;
    const int64_t left = job_.width - column(v);
    const int n = left <= 0 ? 0 : left < kV ? static_cast<int>(left) : kV;
    const E* from = n > 0 ? row + column(v) : row;
    const int bytes = n * static_cast<int>(sizeof(E));
    if (alignment_ == 16) {
      cp_async<16>(to, from, bytes);
    } else if (alignment_ >= 4) {
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const int some = bytes <= i ? 0 : bytes - i < 4 ? bytes - i : 4;
        cp_async<4>(to + i, some ? reinterpret_cast<const unsigned char*>(from) + i
                                 : reinterpret_cast<const unsigned char*>(row), some);
      }
    } else {
      store16(to, load_some(from, n));
    }
  }

  // f: place(k).
  __device__ void fetch_rows(const void* matrix, int64_t stride, int64_t k, int64_t f, int stage, int first) const {
#pragma unroll
    for (int q = 0; q < kGroup; ++q) {
      const int64_t row = __shfl_sync(0xffffffffu, f, q * kTokens);
      if (k + q >= end_) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) fetch(matrix, stride, row, slot(stage, first + q, v), v);
    }
  }
  __device__ void fetch_dots(int64_t k, int64_t f, int stage) const {
    fetch_rows(job_.up, job_.up_stride, k, f, stage, 0);
    if (kGlu) fetch_rows(job_.gate, job_.gate_stride, k, f, stage, kGroup);
  }
  __device__ void fetch_down(int64_t k, int64_t f, int stage) const {
    fetch_rows(job_.down, job_.down_stride, k, f, stage, kDots * kGroup);
  }

  __device__ Scales load_scales(int64_t k, int64_t f) const {
    Scales s{1.0f, 0.0f, 0.0f};
    const int64_t own = k + lane() / kTokens;
    if (lane() >= kPairs || own >= end_) return s;
    if (job_.z) s.z = job_.z[own];
    if (job_.up_bias) s.up_bias = widened(static_cast<const E*>(job_.up_bias)[f]);
    if (kGlu && job_.gate_bias) s.gate_bias = widened(static_cast<const E*>(job_.gate_bias)[f]);
    return s;
  }

  // sums[warp * kMostValues + value]: the warp's part of the group's dot products; value = (matrix, neuron, token).
  // Rows of neurons that are not there hold whatever was there before, and nobody asks for their products.
  __device__ void dots(int stage, float* sums) const {
    float values[kValues] = {};
#pragma unroll
    for (int row = 0; row < kDots * kGroup; ++row)
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float w[kV];
        to_floats<E>(load16(slot(stage, row, v)), w);
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
          for (int i = 0; i < kV; ++i)
            values[row * kTokens + t] = fmaf(w[i], x_[t][v][i], values[row * kTokens + t]);
      }
    warp_sums<kValues>(values);
    constexpr int kLanes = 32 / kValues;
    if (lane() % kLanes == 0) sums[static_cast<int>(threadIdx.x) / 32 * kMostValues + lane() / kLanes] = values[0];
  }

  // In lane q * kTokens + t: the input of neuron q's down row for token t.
  __device__ float activation(const float* sums, const Scales& scales) const {
    float total = 0.0f;
    if (lane() < kValues)
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) total += sums[w * kMostValues + lane()];
    const float gate = kGlu ? __shfl_sync(0xffffffffu, total, (lane() + kPairs) % 32) : 0.0f;
    const float up = total + scales.up_bias;
    return scales.z * (kGlu ? activate<false>(job_.act, gate + scales.gate_bias) * up : activate<false>(job_.act, up));
  }

  __device__ void axpy(int64_t k, int stage, float h) {
#pragma unroll
    for (int q = 0; q < kGroup; ++q) {
      float factor[kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) factor[t] = __shfl_sync(0xffffffffu, h, q * kTokens + t);
      if (k + q >= end_) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float w[kV];
        to_floats<E>(load16(slot(stage, kDots * kGroup + q, v)), w);
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
          for (int i = 0; i < kV; ++i) y_[t][v][i] = fmaf(w[i], factor[t], y_[t][v][i]);
      }
    }
  }

  __device__ void store() const {
    const int64_t pitch = whole_pitch(job_.width);
    float* partial = job_.partial + blockIdx.x * job_.tokens * pitch;
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (t >= job_.tokens || column(v) >= job_.width) continue;
#pragma unroll
        for (int i = 0; i < kV; i += 4)
          store16(partial + t * pitch + column(v) + i, from_floats<float>(&y_[t][v][i]));
      }
  }

  const MlpDecode& job_;
  int64_t begin_, end_;
  unsigned char* ring_;
  float* sums_;
  int alignment_;
  float x_[kTokens][kVectors][kV];
  float y_[kTokens][kVectors][kV] = {};
};

template <class E, int kTokens, int kVectors, int kGroup, bool kGlu>
__global__ void __launch_bounds__(kMostThreads, 1)
    gated_mlp_kernel(const __grid_constant__ MlpDecode job, int64_t chunks) {
  Mlp<E, kTokens, kVectors, kGroup, kGlu>(job, chunks).run();
}

template <class E, int kTokens, int kVectors, int kGroup>
cudaError_t launch_fused(const MlpDecode& job, const MlpPlan& plan, cudaStream_t stream) {
  const auto kernel = job.gate ? gated_mlp_kernel<E, kTokens, kVectors, kGroup, true>
                               : gated_mlp_kernel<E, kTokens, kVectors, kGroup, false>;
  return launch(kernel, static_cast<unsigned>(plan.chunks), static_cast<unsigned>(plan.threads),
                static_cast<size_t>(plan.shared_bytes), stream, job, plan.chunks);
}

template <class E, int kTokens, int kVectors>
cudaError_t launch_group(const MlpDecode& job, const MlpPlan& plan, cudaStream_t stream) {
  if constexpr (kTokens <= 2 && kVectors == 1)
    if (plan.group == 4) return launch_fused<E, kTokens, kVectors, 4>(job, plan, stream);
  if constexpr (kVectors <= 2)
    if (plan.group == 2) return launch_fused<E, kTokens, kVectors, 2>(job, plan, stream);
  if constexpr (kVectors >= 2) return launch_fused<E, kTokens, kVectors, 1>(job, plan, stream);
  return cudaErrorInvalidValue;
}

template <class E>
cudaError_t launch_tokens(const MlpDecode& job, const MlpPlan& plan, cudaStream_t stream) {
  switch (padded_tokens(job.tokens) * 10 + plan.vectors) {
    case 11: return launch_group<E, 1, 1>(job, plan, stream);
    case 12: return launch_group<E, 1, 2>(job, plan, stream);
    case 14: return launch_group<E, 1, 4>(job, plan, stream);
    case 21: return launch_group<E, 2, 1>(job, plan, stream);
    case 22: return launch_group<E, 2, 2>(job, plan, stream);
    default: return launch_group<E, 4, 1>(job, plan, stream);
  }
}

int64_t vectors_of(const MlpDecode& job) {  // of a row
  return (job.width * element_size(job.dtype) + 15) / 16;
}

// What the fused kernel can hold; the rest goes by linear layers, with h (T, K) in between.
bool fits(const MlpDecode& job) {
  const int64_t each = ceil_div(vectors_of(job), kMostThreads);
  return (each <= 1 ? 1 : each <= 2 ? 2 : each <= 4 ? 4 : 8) * padded_tokens(job.tokens) <= 4;
}

int threads_of(const MlpDecode& job) {
  const int64_t rounded = (vectors_of(job) + 31) / 32 * 32;
  return static_cast<int>(rounded < kMostThreads ? rounded : kMostThreads);
}

// A share for every block that an H200 runs at once, but no fewer than eight neurons.
int64_t fused_chunks(const MlpDecode& job) {
  const int64_t per_sm = kMostThreads / threads_of(job), wanted = kSms * (per_sm < 4 ? per_sm : 4);
  const int64_t most = ceil_div(job.kept, 8), chunks = wanted < most ? wanted : most;
  return chunks < 1 ? 1 : chunks;
}

// h by linears_decode, in float; then linear_t_decode.
cudaError_t composed(const MlpDecode& job, int device, void* stream) {
  const int64_t sums = job.tokens * job.kept;
  float *up = job.partial, *gate = job.gate ? up + sums : nullptr;
  const DecodeLayer layers[2] = {{job.up, job.up_stride, job.idx, job.up_bias, up, job.kept, job.rows},
                                 {job.gate, job.gate_stride, job.idx, job.gate_bias, gate, job.kept, job.rows}};
  const LinearsDecode into{job.dtype, job.tokens, job.width, job.x, true, layers, job.gate ? 2 : 1};
  const int error = linears_decode(into, device, stream);
  if (error != 0) return static_cast<cudaError_t>(error);
  LinearTDecode out{};
  out.dtype = job.dtype;
  out.tokens = job.tokens;
  out.width = job.width;
  out.kept = job.kept;
  out.rows = job.rows;
  out.weight = job.down;
  out.stride = job.down_stride;
  out.idx = job.idx;
  out.up = up;
  out.gate = gate;
  out.act = job.act;
  out.z = job.z;
  out.bias = job.down_bias;
  out.residual = job.residual;
  out.y = job.y;
  out.partial = job.partial + (sums * 2 + 3) / 4 * 4;
  out.chunks = linear_t_chunks(job.dtype, job.tokens, job.width, job.kept);
  return static_cast<cudaError_t>(linear_t_decode(out, device, stream));
}

}  // namespace

MlpPlan mlp_plan(const MlpDecode& job, int64_t shared_limit) {
  MlpPlan plan{};
  if (!fits(job)) return plan;
  plan.threads = threads_of(job);
  const int64_t each = ceil_div(vectors_of(job), plan.threads);
  plan.vectors = each <= 1 ? 1 : each <= 2 ? 2 : 4;
  plan.chunks = fused_chunks(job);
  plan.group = padded_tokens(job.tokens) <= 2 && plan.vectors == 1 ? 4 : plan.vectors <= 2 ? 2 : 1;
  const int64_t neuron = int64_t(job.gate ? 3 : 2) * plan.vectors * plan.threads * 16;
  const int64_t sums = int64_t(kStages) * (plan.threads / 32) * kMostValues * 4;
  const int64_t limit = shared_limit < kShared ? shared_limit : kShared;
  // Two neurons of one vector each fit into the 99 KB of an sm_120: one alone has no kernel.
  const int least = plan.vectors == 1 ? 2 : 1;
  while (plan.group > least && kStages * plan.group * neuron + sums > limit) plan.group /= 2;
  plan.shared_bytes = kStages * plan.group * neuron + sums;
  plan.fused = plan.shared_bytes <= limit;
  return plan;
}

int64_t mlp_workspace(const MlpDecode& job) {
  const int64_t row = job.tokens * whole_pitch(job.width);
  const int64_t apart = (job.tokens * job.kept * 2 + 3) / 4 * 4 +
                        linear_t_chunks(job.dtype, job.tokens, job.width, job.kept) * row;
  const int64_t together = fits(job) ? fused_chunks(job) * row : 0;
  return apart > together ? apart : together;
}

int gated_mlp_decode(const MlpDecode& job, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  int limit = 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess || job.tokens == 0 || job.width == 0) return error;
  const MlpPlan plan = mlp_plan(job, limit);
  if (!plan.fused) return composed(job, device, stream);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (job.dtype) {
    case Dtype::bf16: error = launch_tokens<__nv_bfloat16>(job, plan, s); break;
    case Dtype::f16: error = launch_tokens<__half>(job, plan, s); break;
    default: error = launch_tokens<float>(job, plan, s); break;
  }
  if (error != cudaSuccess) return error;
  return add_up(job.dtype, job.partial, plan.chunks, job.tokens, job.width, job.down_bias, job.residual, job.y, s);
}

}  // namespace ppnet::cuda
