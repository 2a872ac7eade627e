// gated_attention_fused on NVIDIA GPUs: checks, hands rows to the launchers of csrc/cuda/gated_attention.cu. The schema
// is in ppnet/ops/gated_attention_fused.py.
#ifdef PPNET_WITH_CUDA

#include "cuda/gated_attention.h"

#include <optional>

#include "check.h"
#include "device.h"
#include "rows.h"

namespace ppnet {
namespace {

using Optional = std::optional<Tensor>;
constexpr const char* kOp = "gated_attention_fused";
constexpr int64_t kMostPositions = int64_t{1} << 30;

// Every row must be aligned to 16 bytes: a copy, where it is not.
bool rows_are_aligned(const Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) return false;
  for (int64_t d = 0; d < 3; ++d)
    if (t.size(d) > 1 && t.stride(d) % 8 != 0) return false;
  return t.stride(3) == 1 || t.size(3) <= 1;
}

Tensor with_aligned_rows(const Tensor& t) {
  if (t.numel() == 0 || rows_are_aligned(t)) return t;
  Tensor copy = torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)});
  return torch::stable::copy_(copy, t);
}

// (B, H, T, Dh) laid out as (B, T, H, Dh).
Tensor empty_by_token(const Tensor& t) {
  return torch::stable::transpose(torch::stable::new_empty(t, {t.size(0), t.size(2), t.size(1), t.size(3)}), 1, 2);
}

cuda::Heads heads(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

void check_rows(const char* name, const Tensor& t, const Tensor& query, const int64_t (&sizes)[4],
                const char* meaning) {
  check_device(kOp, name, t, query);
  check_dtype(kOp, name, t, query.scalar_type(), "the dtype of query");
  check_shape(kOp, name, t, {sizes[0], sizes[1], sizes[2], sizes[3]}, meaning);
}

void check_query(const Tensor& query) {
  PPNET_CHECK(query.is_cuda() == kGpuTensors, kOp, ": query is not on the device of this kernel");
  const ScalarType dtype = query.scalar_type();
  PPNET_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp, ": query has dtype ",
              torch::headeronly::toString(dtype), "; allowed are BFloat16 and Half");
  check_shape(kOp, "query", query, {-1, -1, -1, -1}, "(B, H, T, Dh)");
  const int64_t width = query.size(3);
  PPNET_CHECK(width > 0 && width <= 256 && width % 8 == 0, kOp, ": query has Dh = ", width,
              "; allowed are multiples of 8 up to 256");
}

cuda::MaskKind mask_kind(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool: return cuda::MaskKind::boolean;
    case ScalarType::Float: return cuda::MaskKind::f32;
    case ScalarType::BFloat16: return cuda::MaskKind::bf16;
    case ScalarType::Half: return cuda::MaskKind::f16;
    default:
      fail(kOp, ": mask has dtype ", torch::headeronly::toString(mask.scalar_type()),
           "; allowed are Bool (true: attend), Float, BFloat16 and Half (added to the scores)");
  }
}

// The arguments as the kernels take them; owns the copies.
struct Arguments {
  Tensor query, key, value;
  Optional gate, groups, mask, used;
  bool is_causal;
  double scale;
  int64_t window;

  void check() {
    check_query(query);
    check_device(kOp, "key", key, query);
    check_shape(kOp, "key", key, {query.size(0), -1, -1, query.size(3)}, "(B, Hkv, S, Dh) with the B and Dh of query");
    const int64_t sizes[] = {key.size(0), key.size(1), key.size(2), key.size(3)};
    check_rows("key", key, query, sizes, "(B, Hkv, S, Dh)");
    check_rows("value", value, query, sizes, "the shape of key");
    PPNET_CHECK(query.size(2) < kMostPositions && key.size(2) < kMostPositions, kOp, ": query has ", query.size(2),
                " and key ", key.size(2), " positions; at most ", kMostPositions - 1, " are supported");
    PPNET_CHECK(window >= 0, kOp, ": window is ", window, "; allowed are positions >= 1, or 0 for none");
    if (groups) {
      check_device(kOp, "groups", *groups, query);
      check_dtype(kOp, "groups", *groups, ScalarType::Long, "integers are int64");
      check_shape(kOp, "groups", *groups, {-1}, "(G,)");
      groups = torch::stable::contiguous(*groups);
    }
    PPNET_CHECK(kept() == 0 ? query.size(1) == 0 : query.size(1) % kept() == 0, kOp, ": query has ", query.size(1),
                " heads for ", kept(), " KV groups; the number of heads must be a multiple of that of groups");
    if (gate) {
      check_device(kOp, "gate", *gate, query);
      check_dtype(kOp, "gate", *gate, ScalarType::Float, "gates are float32");
      check_shape(kOp, "gate", *gate, {kept()}, "one per KV group");
      gate = torch::stable::contiguous(*gate);
    }
    if (mask) {
      check_device(kOp, "mask", *mask, query);
      const int64_t full[] = {query.size(0), query.size(1), query.size(2), key.size(2)};
      bool fits = mask->dim() == 4;
      for (int64_t d = 0; fits && d < 4; ++d) fits = mask->size(d) == 1 || mask->size(d) == full[d];
      PPNET_CHECK(fits, kOp, ": mask has shape ", shape(*mask),
                  "; it must have four axes and broadcast to (B, H, T, S) = (", full[0], ", ", full[1], ", ", full[2],
                  ", ", full[3], ")");
    }
    if (used) {
      check_device(kOp, "used", *used, query);
      check_dtype(kOp, "used", *used, ScalarType::Bool, "true: some query attends to this key");
      check_shape(kOp, "used", *used, {query.size(0), key.size(2)}, "(B, S)");
    }
    query = with_aligned_rows(query);
    key = with_aligned_rows(key);
    value = with_aligned_rows(value);
  }

  int64_t kept() const { return groups ? groups->size(0) : key.size(1); }

  cuda::GatedAttention describe(const Tensor& out, const Tensor& lse) const {
    cuda::GatedAttention p{};
    p.query = heads(query);
    p.key = heads(key);
    p.value = heads(value);
    p.out = heads(out);
    p.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
    p.gate = gate ? gate->const_data_ptr<float>() : nullptr;
    p.groups = groups ? groups->const_data_ptr<int64_t>() : nullptr;
    if (mask) {
      p.mask = mask->const_data_ptr();
      p.mask_kind = mask_kind(*mask);
      for (int64_t d = 0; d < 4; ++d) p.mask_stride[d] = mask->size(d) == 1 ? 0 : mask->stride(d);
    }
    if (used) {
      p.used = static_cast<const bool*>(used->const_data_ptr());
      for (int64_t d = 0; d < 2; ++d) p.used_stride[d] = used->stride(d);
    }
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.kv_heads = key.size(1);
    p.kept = kept();
    p.per_group = p.kept ? p.heads / p.kept : 0;
    p.tokens = static_cast<int32_t>(query.size(2));
    p.keys = static_cast<int32_t>(key.size(2));
    p.width = static_cast<int32_t>(query.size(3));
    // A window of all positions is none: no query stands after key S - 1.
    p.window = window < key.size(2) ? static_cast<int32_t>(window) : 0;
    p.scale = static_cast<float>(scale);
    p.is_causal = is_causal;
    p.dtype = query.scalar_type() == ScalarType::Half ? cuda::Dtype::f16 : cuda::Dtype::bf16;
    return p;
  }
};

std::tuple<Tensor, Tensor> gated_attention_fused_cuda(Tensor query, Tensor key, Tensor value, Optional gate,
                                                      Optional groups, Optional mask, Optional used, bool is_causal,
                                                      double scale, int64_t window) {
  const DeviceScope device(query);
  Arguments arguments{query, key, value, gate, groups, mask, used, is_causal, scale, window};
  arguments.check();
  const Tensor out = empty_by_token(query);
  const Tensor lse = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  const int error = cuda::gated_attention(arguments.describe(out, lse), device.index(), device.stream());
  PPNET_CHECK(error == 0, kOp, ": ", cuda::error_string(error));
  return {out, lse};
}

// A gradient of t's layout, and where the kernel writes it: elsewhere if its rows cannot be written 16 bytes at a time.
struct Gradient {
  Tensor result, target;
  explicit Gradient(const Tensor& t)
      : result(torch::stable::empty_like(t)), target(result.numel() == 0 || rows_are_aligned(result)
                                                         ? result
                                                         : torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2),
                                                                                        t.size(3)})) {}
  Tensor finish() {
    return target.const_data_ptr() == result.const_data_ptr() ? result : torch::stable::copy_(result, target);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_attention_fused_backward_cuda(
    Tensor dout, Tensor query, Tensor key, Tensor value, Optional gate, Optional groups, Optional mask, Optional used,
    bool is_causal, double scale, int64_t window, Tensor out, Tensor lse) {
  const DeviceScope device(query);
  Gradient dkey(key), dvalue(value);
  Arguments arguments{query, key, value, gate, groups, mask, used, is_causal, scale, window};
  arguments.check();
  const int64_t sizes[] = {query.size(0), query.size(1), query.size(2), query.size(3)};
  check_rows("dout", dout, query, sizes, "the shape of query");
  check_rows("out", out, query, sizes, "the shape of query");
  check_device(kOp, "lse", lse, query);
  check_dtype(kOp, "lse", lse, ScalarType::Float, "sums are float32");
  check_shape(kOp, "lse", lse, {sizes[0], sizes[1], sizes[2]}, "(B, H, T)");
  dout = with_aligned_rows(dout);
  out = with_aligned_rows(out);
  lse = torch::stable::contiguous(lse);
  const cuda::GatedAttention p = arguments.describe(out, lse);

  const Tensor dquery = empty_by_token(query);
  const Tensor dgate = torch::stable::new_empty(query, {gate ? p.kept : 0}, ScalarType::Float);
  const int64_t partials = gate ? cuda::gated_attention_partials(p) : 0;
  const Tensor workspace =
      torch::stable::new_empty(query, {2 * p.batch * p.heads * p.tokens + partials}, ScalarType::Float);
  cuda::GatedAttentionGradients g{};
  g.dout = heads(dout);
  g.dquery = heads(dquery);
  g.dkey = heads(dkey.target);
  g.dvalue = heads(dvalue.target);
  g.rows = workspace.mutable_data_ptr<float>();
  g.partial = gate ? g.rows + 2 * p.batch * p.heads * p.tokens : nullptr;
  g.dgate = gate ? dgate.mutable_data_ptr<float>() : nullptr;
  const int error = cuda::gated_attention_backward(p, g, device.index(), device.stream());
  PPNET_CHECK(error == 0, kOp, ": ", cuda::error_string(error));
  return {dquery, dkey.finish(), dvalue.finish(), dgate};
}

}  // namespace

PPNET_CUDA_OPERATORS(m) {
  m.impl("gated_attention_fused", TORCH_BOX(&gated_attention_fused_cuda));
  m.impl("gated_attention_fused_backward", TORCH_BOX(&gated_attention_fused_backward_cuda));
}

}  // namespace ppnet

#endif
