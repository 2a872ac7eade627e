// gated_attention_decode on the CPU: the schema is in ppnet/ops/gated_attention_decode.py.
#include "cpu/gated_attention_decode.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "gated_attention_decode_check.h"
#include "memory.h"
#include "operators.h"

namespace ppnet {
namespace {

// On the CPU the indices can be looked at.
void check_values(const char* op, const DecodeJob& job, int64_t kv_heads) {
  for (int64_t g = 0; job.group && g < job.groups; ++g)
    PPNET_CHECK(job.group[g] >= 0 && job.group[g] < kv_heads, op, ": groups[", g, "] is ", job.group[g],
                "; allowed are 0 .. ", kv_heads - 1, " (KV heads of key)");
  for (int64_t b = 0; job.lengths && b < job.batch; ++b)
    PPNET_CHECK(job.lengths[b] >= 0 && job.lengths[b] <= job.keys, op, ": lengths[", b, "] is ", job.lengths[b],
                "; allowed are 0 .. ", job.keys, " (positions of key)");
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
  DecodeJob job =
      check_gated_attention_decode(op, query, key, value, groups, gate, mask, lengths, scale, window, false);
  check_values(op, job, key.size(1));
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
