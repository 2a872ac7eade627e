// Launchers of the decoding operators on NVIDIA GPUs. Torch-free: the bindings check, allocate and fill these.
// Strides are in elements; x, y, biases and residuals are contiguous, and of `dtype` as are the weights.
#pragma once

#include <cstdint>

#include "cpu/act.h"
#include "cpu/dtype.h"
#include "sizes.h"

namespace ppnet::cuda {

// Shares of work are chosen for this many multiprocessors, an H200's, on every GPU: so a result is the same on all that
// take the same path. Only gated_mlp_decode asks for more: where a block may not have the shared memory of its fused
// kernel (see mlp_plan), linear layers compute it, with sums in another order.
inline constexpr int64_t kSms = 132;

inline int64_t padded_tokens(int64_t tokens) { return tokens <= 2 ? tokens : tokens <= 4 ? 4 : 8; }

// y (T, K) = x W[idx]^T + bias[idx]: outputs are rows.
struct DecodeLayer {
  const void* weight;
  int64_t stride;
  const int64_t* idx;  // (K), or null: rows 0 .. K - 1
  const void* bias;    // (rows) or null
  void* y;
  int64_t kept, rows;  // K, N
};

struct LinearsDecode {
  Dtype dtype;
  int64_t tokens, width;  // T, D
  const void* x;          // (T, D)
  bool float_y;           // y is float whatever the dtype
  const DecodeLayer* layers;
  int64_t n;
};

// Partial sums of y = (x * z) W[idx], and y = bias + residual + their sum: inputs are rows.
struct LinearTDecode {
  Dtype dtype;
  int64_t tokens, width, kept, rows;  // T, D, K, F
  const void* weight;
  int64_t stride;
  const int64_t* idx;         // (K) or null
  const void* x;              // (T, K); not used where `up` is given
  const float *up, *gate;     // (T, K) each: x = act(gate) * up, or act(up) without a gate
  Act act;
  const float* z;             // (K) or null
  const void *bias, *residual;  // (D), (T, D), or null
  void* y;                    // (T, D)
  float* partial;             // (chunks, T, whole_pitch(D))
  int64_t chunks;
};

// y = (z * act(x gate^T + gate_bias) * (x up^T + up_bias)) down over the kept neurons, + down_bias + residual.
struct MlpDecode {
  Dtype dtype;
  Act act;
  int64_t tokens, width, kept, rows;  // T, D, K, F
  const void *gate, *up, *down;       // gate may be null
  int64_t gate_stride, up_stride, down_stride;
  const void *gate_bias, *up_bias, *down_bias, *residual;  // or null
  const int64_t* idx;
  const float* z;
  const void* x;
  void* y;
  float* partial;  // mlp_workspace(job) floats
};

// How a call is shared out: pure functions of its sizes.
struct LinearPlan {
  int threads, rows_per_warp;
  int64_t tile;        // columns of x in shared memory at a time
  int64_t tile_bytes;
  int64_t groups;      // of threads / 32 * rows_per_warp rows, all layers together
  int64_t blocks;
};
LinearPlan linear_plan(const LinearsDecode& job);
// Of one layer, whole groups.
int64_t linear_groups(int64_t kept, int rows_per_group);

int64_t linear_t_chunks(Dtype dtype, int64_t tokens, int64_t width, int64_t kept);

struct MlpPlan {
  bool fused;        // else linears_decode and linear_t_decode, where a block could not hold its sums in registers
  int threads;       // fused: each holds `vectors` times 16 bytes of a row's columns
  int vectors;
  int group;         // neurons at a time
  int64_t shared_bytes;
  int64_t chunks;
};
// `shared_limit`: bytes of shared memory that a block may have.
MlpPlan mlp_plan(const MlpDecode& job, int64_t shared_limit);
// Floats of workspace, enough for any GPU.
int64_t mlp_workspace(const MlpDecode& job);

// Asynchronous on `stream` (a cudaStream_t) of `device`. They return a cudaError_t, also where there is no driver.
// An idx outside [0, rows) stops the kernel with a device-side assertion.
int linears_decode(const LinearsDecode& job, int device, void* stream);
int linear_t_decode(const LinearTDecode& job, int device, void* stream);
int gated_mlp_decode(const MlpDecode& job, int device, void* stream);

}  // namespace ppnet::cuda
