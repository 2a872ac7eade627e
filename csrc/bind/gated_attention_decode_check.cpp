// Checks of gated_attention_decode, and what its kernels read of the arguments.
#include "gated_attention_decode_check.h"

namespace ppnet {
namespace {

void check_query(const char* op, const Tensor& query, bool cuda) {
  check_narrow(op, "query", query);
  check_kernel_device(op, "query", query, cuda);
  expect_shape(op, "query", query, {-1, -1, -1, -1}, "(B, H, T, Dh)");
}

void check_cache(const char* op, const char* name, const Tensor& t, const Tensor& query) {
  check_dtype(op, name, t, query.scalar_type(), "the dtype of query");
  check_same_device(op, name, t, query);
  expect_shape(op, name, t, {query.size(0), -1, -1, query.size(3)}, "(B, Hkv, S, Dh) with the B and Dh of query");
  PPNET_CHECK(t.size(3) <= 1 || t.stride(3) == 1, op, ": ", name, " has stride ", t.stride(3),
              " along its last axis; it must be contiguous there (1), because a copy would cost more than the",
              " call");
  PPNET_CHECK(t.size(2) < INT32_MAX, op, ": ", name, " has ", t.size(2), " positions; at most ", INT32_MAX - 1,
              " are supported");
}

// Sizes of 1 and absent leading axes broadcast.
void set_mask(const char* op, const Tensor& mask, const Tensor& query, int64_t keys, DecodeJob& job) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool: job.mask_kind = MaskKind::boolean; break;
    case ScalarType::Float: job.mask_kind = MaskKind::f32; break;
    case ScalarType::BFloat16: job.mask_kind = MaskKind::bf16; break;
    case ScalarType::Half: job.mask_kind = MaskKind::f16; break;
    case ScalarType::Double: job.mask_kind = MaskKind::f64; break;
    default:
      PPNET_CHECK(false, op, ": mask has dtype ", torch::headeronly::toString(mask.scalar_type()),
                  "; allowed are Bool (true: attend), Float, BFloat16, Half and Double (added to the scores)");
  }
  check_same_device(op, "mask", mask, query);
  const int64_t full[] = {query.size(0), query.size(1), query.size(2), keys};
  bool fits = mask.dim() >= 1 && mask.dim() <= 4;
  for (int64_t d = 0; fits && d < mask.dim(); ++d) {
    const int64_t axis = 4 - mask.dim() + d, size = mask.size(d);
    fits = size == 1 || size == full[axis];
    job.mask_stride[axis] = size == 1 ? 0 : mask.stride(d);
  }
  PPNET_CHECK(fits, op, ": mask has shape ", shape(mask), "; it must broadcast to (B, H, T, S) = (", full[0], ", ",
              full[1], ", ", full[2], ", ", full[3], ")");
  job.mask = static_cast<const char*>(mask.const_data_ptr());
}

void set_rows(const Tensor& t, const char*& data, int64_t* stride) {
  data = static_cast<const char*>(t.const_data_ptr());
  for (int64_t d = 0; d < 3; ++d) stride[d] = t.stride(d);
}

void check_vector(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t size,
                  const char* meaning, const Tensor& query) {
  check_dtype(op, name, t, dtype, dtype == ScalarType::Long ? "integers are int64" : "gates are float32");
  check_same_device(op, name, t, query);
  expect_shape(op, name, t, {size}, meaning);
}

int64_t set_groups(const char* op, const Optional& groups, const Tensor& query, const Tensor& key, DecodeJob& job) {
  const int64_t heads = query.size(1);
  job.groups = key.size(1);
  if (groups) {
    check_vector(op, "groups", *groups, ScalarType::Long, -1, "(G,)", query);
    job.groups = groups->size(0);
    job.group = groups->const_data_ptr<int64_t>();
  }
  PPNET_CHECK(job.groups == 0 ? heads == 0 : heads % job.groups == 0, op, ": query has ", heads, " heads for ",
              job.groups, " KV groups; the number of heads must be a multiple of that of groups");
  return job.groups == 0 ? 0 : heads / job.groups;
}

}  // namespace

DecodeJob check_gated_attention_decode(const char* op, Tensor& query, const Tensor& key, const Tensor& value,
                                       Optional& groups, Optional& gate, const Optional& mask, Optional& lengths,
                                       double scale, int64_t window, bool cuda) {
  check_query(op, query, cuda);
  check_cache(op, "key", key, query);
  check_cache(op, "value", value, query);
  expect_shape(op, "value", value, {key.size(0), key.size(1), key.size(2), key.size(3)}, "the shape of key");
  PPNET_CHECK(window >= 0, op, ": window is ", window, "; allowed are positions >= 1, or 0 for none");
  if (query.size(3) > 1 && query.stride(3) != 1) query = torch::stable::contiguous(query);
  for (Optional* t : {&groups, &gate, &lengths})
    if (*t && !(*t)->is_contiguous()) *t = torch::stable::contiguous(**t);

  DecodeJob job{};
  job.dtype = dtype_of(query);
  job.batch = query.size(0), job.tokens = query.size(2), job.width = query.size(3), job.keys = key.size(2);
  job.per_group = set_groups(op, groups, query, key, job);
  set_rows(query, job.query, job.query_stride);
  set_rows(key, job.key, job.key_stride);
  set_rows(value, job.value, job.value_stride);
  if (gate) {
    check_vector(op, "gate", *gate, ScalarType::Float, job.groups, "(G,)", query);
    job.gate = gate->const_data_ptr<float>();
  }
  if (mask) set_mask(op, *mask, query, job.keys, job);
  if (lengths) {
    check_vector(op, "lengths", *lengths, ScalarType::Long, query.size(0), "(B,)", query);
    job.lengths = lengths->const_data_ptr<int64_t>();
  }
  job.window = window;
  job.scale = static_cast<float>(scale);
  return job;
}

}  // namespace ppnet
