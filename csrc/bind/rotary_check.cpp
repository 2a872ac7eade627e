// rotary: the arguments, checked.
#include "decode_jobs.h"

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
  check_same_device(op, name, angles, query);
  check_dtype(op, name, angles, query.scalar_type(), "that of query");
  const bool shared = angles.dim() == 3 && angles.size(0) == 1;
  expect_shape(op, name, angles, {shared ? 1 : query.size(0), query.size(2), query.size(3)}, "(B or 1, T, Dh)");
}

}  // namespace

Rotary rotary_job(const char* op, Tensor& query, Tensor& key, Tensor& cos, Tensor& sin, bool gpu, Tensor& y,
                  Tensor& z) {
  check_kernel_device(op, "query", query, gpu);
  check_narrow(op, "query", query);
  PPNET_CHECK(query.dim() == 4, op, ": query has shape ", shape(query), "; it must be (B, H, T, Dh)");
  const int64_t batch = query.size(0), tokens = query.size(2), width = query.size(3);
  PPNET_CHECK(width % 2 == 0, op, ": query has shape ", shape(query), "; its last axis, Dh, must be even");
  check_same_device(op, "key", key, query);
  check_dtype(op, "key", key, query.scalar_type(), "that of query");
  expect_shape(op, "key", key, {batch, -1, tokens, width}, "(B, Hkv, T, Dh) with B, T and Dh of query");
  check_angles(op, "cos", cos, query);
  check_angles(op, "sin", sin, query);
  PPNET_CHECK(cos.size(0) == sin.size(0), op, ": sin has shape ", shape(sin), "; it must be that of cos, ",
              shape(cos));
  y = torch::stable::new_empty(query, {batch, tokens, query.size(1), width});
  z = torch::stable::new_empty(query, {batch, tokens, key.size(1), width});
  Rotary job{};
  job.dtype = dtype_of(query);
  job.tokens = tokens;
  job.width = width;
  if (batch * tokens * width == 0) return job;
  query = with_contiguous_rows(query);
  key = with_contiguous_rows(key);
  cos = torch::stable::contiguous(cos);
  sin = torch::stable::contiguous(sin);
  const int64_t bytes = element_size(dtype_of(query)), row = width * bytes;
  job.query = heads_of(query, y, bytes);
  job.key = heads_of(key, z, bytes);
  job.cos = static_cast<const char*>(cos.const_data_ptr());
  job.sin = static_cast<const char*>(sin.const_data_ptr());
  job.angle_token_stride = row;
  job.angle_batch_stride = cos.size(0) == batch ? tokens * row : 0;
  return job;
}

}  // namespace ppnet
