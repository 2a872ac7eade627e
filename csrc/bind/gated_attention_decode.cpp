// gated_attention_decode on the CPU: the schema is in ppnet/ops/gated_attention_decode.py.
#include "cpu/gated_attention_decode.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "memory.h"
#include "operators.h"

namespace ppnet {
namespace {

void check_query(const char* op, const Tensor& query) {
  check_narrow(op, "query", query);
  check_cpu(op, "query", query);
  expect_shape(op, "query", query, {-1, -1, -1, -1}, "(B, H, T, Dh)");
}

void check_cache(const char* op, const char* name, const Tensor& t, const Tensor& query) {
  check_dtype(op, name, t, query.scalar_type(), "the dtype of query");
  check_cpu(op, name, t);
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
  check_cpu(op, "mask", mask);
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
                  const char* meaning) {
  check_dtype(op, name, t, dtype, dtype == ScalarType::Long ? "integers are int64" : "gates are float32");
  check_cpu(op, name, t);
  expect_shape(op, name, t, {size}, meaning);
}

int64_t set_groups(const char* op, const Optional& groups, const Tensor& query, const Tensor& key, DecodeJob& job) {
  const int64_t heads = query.size(1), all = key.size(1);
  job.groups = all;
  if (groups) {
    check_vector(op, "groups", *groups, ScalarType::Long, -1, "(G,)");
    job.groups = groups->size(0);
    job.group = groups->const_data_ptr<int64_t>();
    for (int64_t g = 0; g < job.groups; ++g)
      PPNET_CHECK(job.group[g] >= 0 && job.group[g] < all, op, ": groups[", g, "] is ", job.group[g],
                  "; allowed are 0 .. ", all - 1, " (KV heads of key)");
  }
  PPNET_CHECK(job.groups == 0 ? heads == 0 : heads % job.groups == 0, op, ": query has ", heads, " heads for ",
              job.groups, " KV groups; the number of heads must be a multiple of that of groups");
  return job.groups == 0 ? 0 : heads / job.groups;
}

void set_lengths(const char* op, const Tensor& lengths, const Tensor& query, int64_t keys, DecodeJob& job) {
  check_vector(op, "lengths", lengths, ScalarType::Long, query.size(0), "(B,)");
  job.lengths = lengths.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < job.batch; ++b)
    PPNET_CHECK(job.lengths[b] >= 0 && job.lengths[b] <= keys, op, ": lengths[", b, "] is ", job.lengths[b],
                "; allowed are 0 .. ", keys, " (positions of key)");
}

void run(DecodeJob& job) {
  const int64_t attended = job.window > 0 ? std::min(job.keys, job.window + job.tokens) : job.keys;
  const int64_t bytes = job.batch * job.groups * attended * job.width * 2 * element_size(job.dtype);
  const int64_t work = bytes * std::max<int64_t>(1, decode_rows(job) / 4);
  const int64_t threads = std::clamp<int64_t>(
      work / kBytesPerThread, 1, std::min(decode_units(job), static_cast<int64_t>(torch::stable::get_num_threads())));
  const int64_t scratch = (decode_scratch_bytes(job) + 63) / 64 * 64, partial = decode_partial_floats(job);
  const int64_t counters = job.batch * job.groups + threads;
  Workspace workspace = Workspace::of_this_thread((counters + partial) * 4 + scratch * threads);
  job.threads = threads;
  job.next = workspace.take<int32_t>(counters);
  for (int64_t t = 0; t < threads; ++t) job.next[t] = static_cast<int32_t>(decode_share(job, t));
  job.done = job.next + threads;
  std::fill_n(job.done, counters - threads, 0);
  job.partial = workspace.take<float>(partial);
  char* scratches = workspace.take<char>(scratch * threads);
  const auto kernel = PPNET_PICK(gated_attention_decode);
  if (threads == 1) return kernel(job, 0, scratches);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) kernel(job, t, scratches + t * scratch);
  });
}

// (B, H, T, Dh) of query's dtype, laid out as (B, T, H, Dh): one call where new_empty and transpose are two.
Tensor empty_by_token(const Tensor& query) {
  const int64_t heads = query.size(1), tokens = query.size(2), width = query.size(3);
  const int64_t sizes[] = {query.size(0), heads, tokens, width};
  const int64_t strides[] = {tokens * heads * width, width, heads * width, 1};
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(query.get(), &dtype));
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

}  // namespace

Tensor cpu::gated_attention_decode(const char* op, Tensor query, const Tensor& key, const Tensor& value,
                                   Optional groups, Optional gate, const Optional& mask, Optional lengths,
                                   double scale, int64_t window) {
  check_query(op, query);
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
    check_vector(op, "gate", *gate, ScalarType::Float, job.groups, "(G,)");
    job.gate = gate->const_data_ptr<float>();
  }
  if (mask) set_mask(op, *mask, query, job.keys, job);
  if (lengths) set_lengths(op, *lengths, query, job.keys, job);
  job.window = window;
  job.scale = static_cast<float>(scale);
  job.chunks = std::max<int64_t>(1, (job.keys + kDecodeChunk - 1) / kDecodeChunk);
  Tensor out = empty_by_token(query);
  job.out = static_cast<char*>(out.mutable_data_ptr());
  if (out.numel() > 0) run(job);
  return out;
}

namespace {

Tensor gated_attention_decode_cpu(Tensor query, Tensor key, Tensor value, Optional groups, Optional gate,
                                  Optional mask, Optional lengths, double scale, int64_t window) {
  return cpu::gated_attention_decode("gated_attention_decode", query, key, value, groups, gate, mask, lengths, scale,
                                     window);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) {
  m.impl("gated_attention_decode", TORCH_BOX(&gated_attention_decode_cpu));
}

}  // namespace ppnet
