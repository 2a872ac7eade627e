// gated_mlp_fused on NVIDIA GPUs; the schema is in ppnet/ops/gated_mlp_fused.py. Elsewhere it is gated_mlp's library path.
#ifdef PPNET_WITH_CUDA

#include "cuda/gated_mlp_fused.h"

#include <algorithm>
#include <optional>

#include "check.h"
#include "cuda/rows.h"
#include "device.h"
#include "rows.h"

namespace ppnet {
namespace {

using Optional = std::optional<Tensor>;

constexpr const char* kOp = "gated_mlp_fused";
constexpr int64_t kMostSplits = 1024;
constexpr int64_t kMostSize = 1 << 30;

int32_t size_of(const char* name, const Tensor& t, int64_t d) {
  PPNET_CHECK(t.size(d) <= kMostSize, kOp, ": ", name, " has shape ", shape(t), "; no size may be above ", kMostSize);
  return static_cast<int32_t>(t.size(d));
}

// A matrix of neurons (F, N), rows contiguous.
const void* neurons(const char* name, const Tensor& t, const Tensor& x, int64_t units, int64_t width,
                    const char* meaning, int64_t& stride) {
  check_device(kOp, name, t, x);
  check_dtype(kOp, name, t, x.scalar_type(), "the dtype of x");
  check_shape(kOp, name, t, {units, width}, meaning);
  const bool rows = t.size(1) <= 1 || t.stride(1) == 1;
  PPNET_CHECK(rows && (t.size(0) <= 1 || t.stride(0) >= t.size(1)), kOp, ": ", name, " of shape ", shape(t),
              " has strides (", t.stride(0), ", ", t.stride(1),
              "); its rows must be contiguous: store it unit by unit (ppnet.accelerate does)");
  stride = t.size(0) > 1 ? t.stride(0) : cuda::whole_pitch(t.size(1));
  return t.const_data_ptr();
}

// A vector (n), contiguous in place; null where absent.
const void* vector(const char* name, Optional& t, const Tensor& x, ScalarType dtype, int64_t n, const char* meaning,
                   const char* because) {
  if (!t) return nullptr;
  check_device(kOp, name, *t, x);
  check_dtype(kOp, name, *t, dtype, because);
  check_shape(kOp, name, *t, {n}, meaning);
  if (!t->is_contiguous()) t = torch::stable::contiguous(*t);
  return t->const_data_ptr();
}

void choose(cuda::GatedMlp& job, int64_t tile, int64_t split) {
  PPNET_CHECK(tile >= 0 && tile <= 3, kOp, ": tile is ", tile,
              "; allowed are 1 (32x64), 2 (64x128), 3 (128x128) and 0, by size");
  PPNET_CHECK(split >= 0 && split <= kMostSplits, kOp, ": split is ", split, "; allowed are 0, by size, to ", kMostSplits);
  job.plan = cuda::gated_mlp_plan(job.tokens, job.width, job.out_width, job.kept, job.gated);
  if (tile > 0) job.plan.hidden = job.plan.down = static_cast<cuda::MlpTile>(tile);
  // No part is empty: 64 neurons are a step.
  if (split > 0) job.plan.splits = static_cast<int32_t>(std::min<int64_t>(split, (int64_t{job.kept} + 63) / 64));
}

Tensor gated_mlp_fused_cuda(Tensor x, Tensor up, Tensor down, Optional gate, Optional up_bias, Optional gate_bias,
                            Optional down_bias, Optional idx, Optional z, std::string act, int64_t tile,
                            int64_t split) {
  const ScalarType dtype = x.scalar_type();
  PPNET_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp, ": x has dtype ",
              torch::headeronly::toString(dtype), "; allowed are BFloat16 and Half");
  PPNET_CHECK(up.dim() == 2, kOp, ": up has shape ", shape(up), "; it must be (F, D)");
  check_shape(kOp, "x", x, {-1, up.size(1)}, "(T, D), D that of up");
  PPNET_CHECK(down.dim() == 2, kOp, ": down has shape ", shape(down), "; it must be (F, D)");
  PPNET_CHECK(gate || !gate_bias, kOp, ": gate_bias is given, but gate is not");
  cuda::GatedMlp job{};
  job.dtype = dtype_of(x);
  job.act = act_named(kOp, act);
  job.gated = gate.has_value();
  job.tokens = size_of("x", x, 0);
  job.width = size_of("up", up, 1);
  job.units = size_of("up", up, 0);
  job.out_width = size_of("down", down, 1);
  if (!((x.size(1) <= 1 || x.stride(1) == 1) && (x.size(0) <= 1 || x.stride(0) >= 0))) x = torch::stable::contiguous(x);
  job.x = x.const_data_ptr();
  job.x_stride = x.size(0) > 1 ? x.stride(0) : cuda::whole_pitch(x.size(1));
  job.up = neurons("up", up, x, job.units, job.width, "(F, D)", job.up_stride);
  job.down = neurons("down", down, x, job.units, job.out_width, "(F, D), F that of up", job.down_stride);
  if (gate) job.gate = neurons("gate", *gate, x, job.units, job.width, "(F, D), as up", job.gate_stride);
  job.up_bias = vector("up_bias", up_bias, x, dtype, job.units, "(F,)", "the dtype of x");
  job.gate_bias = vector("gate_bias", gate_bias, x, dtype, job.units, "(F,)", "the dtype of x");
  job.down_bias = vector("down_bias", down_bias, x, dtype, job.out_width, "(D,)", "the dtype of x");
  job.idx = static_cast<const int64_t*>(vector("idx", idx, x, ScalarType::Long, -1, "(K,)", "indices are int64"));
  job.kept = idx ? size_of("idx", *idx, 0) : job.units;
  job.z = static_cast<const float*>(vector("z", z, x, ScalarType::Float, job.kept, "(K,)", "gates are float32"));
  choose(job, tile, split);

  const DeviceScope device(x);
  const Tensor y = torch::stable::new_empty(x, {x.size(0), down.size(1)});
  job.h_stride = cuda::whole_pitch(job.kept);
  const Tensor h = torch::stable::new_empty(x, {x.size(0), job.h_stride});
  job.partial_stride = cuda::whole_pitch(job.out_width);
  const int64_t parts = job.plan.splits > 1 ? job.plan.splits : 0;
  const Tensor partial = torch::stable::new_empty(x, {parts, x.size(0), job.partial_stride}, ScalarType::Float);
  job.h = h.mutable_data_ptr();
  job.partial = partial.mutable_data_ptr<float>();
  job.y = y.mutable_data_ptr();
  const int error = cuda::gated_mlp_fused(job, device.index(), device.stream());
  PPNET_CHECK(error == 0, kOp, ": ", cuda::error_string(error));
  return y;
}

}  // namespace

PPNET_CUDA_OPERATORS(m) { m.impl("gated_mlp_fused", TORCH_BOX(&gated_mlp_fused_cuda)); }

}  // namespace ppnet

#ifdef PPNET_EMULATOR
// For the tests: plan[0], plan[1] the tiles of h and y, plan[2] the splits.
extern "C" __attribute__((visibility("default"))) void ppnet_gated_mlp_plan(int64_t tokens, int64_t width,
                                                                            int64_t out_width, int64_t kept, int gated,
                                                                            int32_t* plan) {
  const ppnet::cuda::MlpPlan chosen = ppnet::cuda::gated_mlp_plan(tokens, width, out_width, kept, gated != 0);
  plan[0] = static_cast<int32_t>(chosen.hidden);
  plan[1] = static_cast<int32_t>(chosen.down);
  plan[2] = chosen.splits;
}
#endif

#endif
