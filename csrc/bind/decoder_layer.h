// qkv_decode and attend_mlp_decode, made of the operators of one device: the schemas are in ppnet/ops/decoder_layer.py.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <utility>

#include "operators.h"

namespace ppnet {

struct DecodeOperators {
  bool gpu;  // whose tensors they take
  decode::RmsNorm* rms_norm;
  decode::Linears* linears_decode;
  decode::Rotary* rotary;
  decode::Attention* gated_attention_decode;
  decode::LinearT* linear_t_decode;
  decode::Mlp* gated_mlp_decode;
};

// The same memory from t's first element on.
template <size_t N>
Tensor viewed(const Tensor& t, const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& strides) {
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(N), sizes.data(),
                                                               strides.data(), 0, &out));
  return Tensor(out);
}

inline Tensor rows(const Tensor& t, int64_t count, int64_t width) { return viewed<2>(t, {count, width}, {width, 1}); }

// What goes into products and norms with t; the operators called from here speak of an x.
inline void check_alike(const char* op, const char* name, const Tensor& t, const Tensor& like, const char* which) {
  check_same_device(op, name, t, like);
  check_dtype(op, name, t, like.scalar_type(), which);
}

// A weight (D, units) as nn.Linear holds it, stored unit by unit, as rows of units.
inline Tensor unit_rows(const char* op, const char* name, const Tensor& weight, int64_t width, int64_t units,
                 const char* meaning) {
  expect_shape(op, name, weight, {width, units}, meaning);
  const bool by_unit = (weight.size(0) <= 1 || weight.stride(0) == 1) &&
                       (weight.size(1) <= 1 || weight.stride(1) >= weight.size(0));
  PPNET_CHECK(by_unit, op, ": ", name, " of shape ", shape(weight), " has strides (", weight.stride(0), ", ",
              weight.stride(1), "); its columns must be contiguous: store it unit by unit (ppnet.accelerate does)");
  return viewed<2>(weight, {weight.size(1), weight.size(0)}, {weight.stride(1), weight.stride(0)});
}

// x: (B, T, D) with at most kMostTokens tokens in all, contiguous in place.
inline void check_sequences(const char* op, const char* name, Tensor& x, bool gpu) {
  check_kernel_device(op, name, x, gpu);
  check_narrow(op, name, x);
  PPNET_CHECK(x.dim() == 3 && x.size(0) * x.size(1) <= kMostTokens, op, ": ", name, " has shape ", shape(x),
              "; it must be (B, T, D) with at most ", kMostTokens, " tokens in all");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
}

// Contiguous heads of tokens, (B T, H Dh) or (B, T, H, Dh), as (B, H, T, Dh).
inline Tensor by_head(const Tensor& y, int64_t batch, int64_t tokens, int64_t width) {
  const int64_t heads = y.dim() == 4 ? y.size(2) : y.size(1) / width;
  return viewed<4>(y, {batch, heads, tokens, width}, {tokens * heads * width, width, heads * width, 1});
}

template <const DecodeOperators& kOps>
std::tuple<Tensor, Tensor, Tensor> qkv_decode(Tensor x, Tensor norm, double eps, std::vector<Tensor> weight,
                                                  std::vector<Optional> bias, std::vector<Optional> idx,
                                                  Optional q_norm, Optional k_norm, Tensor cos, Tensor sin) {
  const char* op = "qkv_decode";
  check_sequences(op, "x", x, kOps.gpu);
  PPNET_CHECK(weight.size() == 3, op, ": weight has ", weight.size(), " entries; it needs those of q, k and v");
  const int64_t batch = x.size(0), tokens = x.size(1), features = x.size(2);
  for (size_t i = 0; i < 3; ++i)
    PPNET_CHECK(has_shape(weight[i], {-1, features}), op, ": weight[", i, "] has shape ", shape(weight[i]),
                "; it must be (N, D) = (any, ", features, "), D that of x");
  expect_shape(op, "norm", norm, {features}, "(D,), D that of x");
  expect_shape(op, "cos", cos, {-1, tokens, -1}, "(B or 1, T, Dh)");
  const int64_t width = cos.size(2);
  PPNET_CHECK(width > 0 && width % 2 == 0, op, ": cos has shape ", shape(cos),
              "; its last axis, Dh, must be even and not empty");
  check_alike(op, "cos", cos, x, "that of x");
  check_alike(op, "sin", sin, x, "that of x");
  if (q_norm) expect_shape(op, "q_norm", *q_norm, {width}, "(Dh,), Dh the last axis of cos");
  if (k_norm) expect_shape(op, "k_norm", *k_norm, {width}, "(Dh,), Dh the last axis of cos");
  const Tensor normed = kOps.rms_norm(op, rows(x, batch * tokens, features), norm, eps, "norm");
  std::vector<Tensor> y = kOps.linears_decode(op, normed, weight, bias, idx);
  for (size_t i = 0; i < 3; ++i)
    PPNET_CHECK(y[i].size(1) % width == 0, op, ": weight[", i, "] has ", y[i].size(1),
                " kept rows; they must be whole heads of Dh = ", width, ", the last axis of cos");
  PPNET_CHECK(y[1].size(1) == y[2].size(1), op, ": weight[2] has ", y[2].size(1), " kept rows, but weight[1] has ",
              y[1].size(1), "; k and v need the same");
  const auto normed_heads = [&](Tensor& heads, const Optional& scale, const char* name) {
    const int64_t all = heads.size(1);
    if (scale)
      heads = rows(kOps.rms_norm(op, rows(heads, batch * tokens * all / width, width), *scale, eps, name),
                   batch * tokens, all);
  };
  normed_heads(y[0], q_norm, "q_norm");
  normed_heads(y[1], k_norm, "k_norm");
  const auto [query, key] =
      kOps.rotary(op, by_head(y[0], batch, tokens, width), by_head(y[1], batch, tokens, width), cos, sin);
  return {by_head(query, batch, tokens, width), by_head(key, batch, tokens, width),
          by_head(y[2], batch, tokens, width)};
}

template <const DecodeOperators& kOps>
Tensor attend_mlp_decode(Tensor residual, Tensor query, Tensor key, Tensor value, Optional mask, double scale,
                             Tensor out, Optional out_bias, Optional out_idx, Optional out_z, Tensor norm, double eps,
                             Tensor up, Tensor down, Optional gate, Optional up_bias, Optional gate_bias,
                             Optional down_bias, Optional idx, Optional z, std::string act) {
  const char* op = "attend_mlp_decode";
  check_sequences(op, "residual", residual, kOps.gpu);
  const char* which = "that of residual";
  check_alike(op, "query", query, residual, which);
  expect_shape(op, "query", query, {residual.size(0), -1, residual.size(1), -1}, "(B, H, T, Dh)");
  const int64_t tokens = residual.size(0) * residual.size(1), width = residual.size(2);
  const int64_t features = query.size(1) * query.size(3);
  const std::pair<const char*, const Tensor&> parts[] = {{"out", out}, {"norm", norm}, {"up", up}, {"down", down}};
  for (const auto& [name, part] : parts) check_alike(op, name, part, residual, which);
  const std::pair<const char*, const Optional&> options[] = {{"out_bias", out_bias},   {"gate", gate},
                                                             {"up_bias", up_bias},     {"gate_bias", gate_bias},
                                                             {"down_bias", down_bias}};
  for (const auto& [name, option] : options)
    if (option) check_alike(op, name, *option, residual, which);
  if (out_idx) expect_shape(op, "out_idx", *out_idx, {features}, "(H Dh,), as query has");
  const Tensor out_rows =
      unit_rows(op, "out", out, width, out_idx ? -1 : features,
                out_idx ? "(D, F), D that of residual" : "(D, H Dh), D that of residual, H and Dh of query");
  expect_shape(op, "norm", norm, {width}, "(D,), D that of residual");
  expect_shape(op, "up", up, {-1, width}, "(N, D), D that of residual");
  const Tensor down_rows = unit_rows(op, "down", down, width, up.size(0), "(D, N), as up has");
  const Tensor attended = kOps.gated_attention_decode(op, query, key, value, std::nullopt, std::nullopt, mask,
                                                      std::nullopt, scale, 0);
  const Tensor heads = rows(attended, tokens, features);  // laid out as (B, T, H, Dh)
  const Tensor x = kOps.linear_t_decode(op, {"out", "out_bias", "out_idx", "out_z"}, heads, out_rows, out_bias,
                                        out_idx, out_z, residual.const_data_ptr());
  const Tensor normed = kOps.rms_norm(op, x, norm, eps, "norm");
  const Tensor y = kOps.gated_mlp_decode(op, normed, up, down_rows, gate, up_bias, gate_bias, down_bias, idx, z, act,
                                         x.const_data_ptr());
  return viewed<3>(y, {residual.size(0), residual.size(1), width}, {residual.size(1) * width, width, 1});
}

}  // namespace ppnet
