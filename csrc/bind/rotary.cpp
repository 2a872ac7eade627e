// rotary on the CPU: the schema is in ppnet/ops/rotary.py.
#include "cpu/rotary.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "memory.h"
#include "operators.h"

namespace ppnet {
namespace {

Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

RotaryHeads heads_of(const Tensor& x, Tensor& y, int64_t bytes) {
  return {static_cast<const char*>(x.const_data_ptr()), x.size(1), x.stride(0) * bytes, x.stride(1) * bytes,
          x.stride(2) * bytes, static_cast<char*>(y.mutable_data_ptr())};
}

void check_angles(const char* op, const char* name, const Tensor& angles, const Tensor& query) {
  check_cpu(op, name, angles);
  check_dtype(op, name, angles, query.scalar_type(), "that of query");
  const bool shared = angles.dim() == 3 && angles.size(0) == 1;
  expect_shape(op, name, angles, {shared ? 1 : query.size(0), query.size(2), query.size(3)}, "(B or 1, T, Dh)");
}

}  // namespace

// Outputs are (B, T, H, Dh): transposed in ppnet/ops/rotary.py.
std::tuple<Tensor, Tensor> cpu::rotary(const char* op, Tensor query, Tensor key, Tensor cos, Tensor sin) {
  check_cpu(op, "query", query);
  check_narrow(op, "query", query);
  PPNET_CHECK(query.dim() == 4, op, ": query has shape ", shape(query), "; it must be (B, H, T, Dh)");
  const int64_t batch = query.size(0), tokens = query.size(2), width = query.size(3);
  PPNET_CHECK(width % 2 == 0, op, ": query has shape ", shape(query), "; its last axis, Dh, must be even");
  check_cpu(op, "key", key);
  check_dtype(op, "key", key, query.scalar_type(), "that of query");
  expect_shape(op, "key", key, {batch, -1, tokens, width}, "(B, Hkv, T, Dh) with B, T and Dh of query");
  check_angles(op, "cos", cos, query);
  check_angles(op, "sin", sin, query);
  PPNET_CHECK(cos.size(0) == sin.size(0), op, ": sin has shape ", shape(sin), "; it must be that of cos, ",
              shape(cos));
  Tensor y = torch::stable::new_empty(query, {batch, tokens, query.size(1), width});
  Tensor z = torch::stable::new_empty(query, {batch, tokens, key.size(1), width});
  if (batch * tokens * width == 0) return {y, z};
  query = with_contiguous_rows(query);
  key = with_contiguous_rows(key);
  cos = torch::stable::contiguous(cos);
  sin = torch::stable::contiguous(sin);
  const int64_t bytes = element_size(dtype_of(query)), row = width * bytes;
  Rotary job{};
  job.dtype = dtype_of(query);
  job.tokens = tokens;
  job.width = width;
  job.query = heads_of(query, y, bytes);
  job.key = heads_of(key, z, bytes);
  job.cos = static_cast<const char*>(cos.const_data_ptr());
  job.sin = static_cast<const char*>(sin.const_data_ptr());
  job.angle_token_stride = row;
  job.angle_batch_stride = cos.size(0) == batch ? tokens * row : 0;
  const int64_t per_token = 2 * (query.size(1) + key.size(1) + 1) * row;
  const auto kernel = PPNET_PICK(rotary);
  torch::stable::parallel_for(0, batch * tokens, std::max<int64_t>(1, kBytesPerThread / per_token),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  return {y, z};
}

namespace {

std::tuple<Tensor, Tensor> rotary_cpu(Tensor query, Tensor key, Tensor cos, Tensor sin) {
  return cpu::rotary("rotary", query, key, cos, sin);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) { m.impl("rotary", TORCH_BOX(&rotary_cpu)); }

}  // namespace ppnet
