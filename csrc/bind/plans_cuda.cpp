// For the tests: how the decode operators would divide a call, as numbers. Only in the library of emulated kernels.
#ifdef PPNET_EMULATOR

#include <cstddef>
#include <vector>

#include "cuda/decode.h"
#include "cuda/gated_attention_decode.h"

#define PPNET_TEST_HOOK extern "C" __attribute__((visibility("default")))

using namespace ppnet;

PPNET_TEST_HOOK int64_t ppnet_linear_t_chunks(int32_t dtype, int64_t tokens, int64_t width, int64_t kept) {
  return cuda::linear_t_chunks(static_cast<Dtype>(dtype), tokens, width, kept);
}

// plan: threads, rows_per_warp, tile, tile_bytes, groups, blocks.
PPNET_TEST_HOOK void ppnet_linear_plan(int32_t dtype, int64_t tokens, int64_t width, const int64_t* kept, int64_t layers,
                                       int64_t* plan) {
  std::vector<cuda::DecodeLayer> all(static_cast<std::size_t>(layers));
  for (int64_t i = 0; i < layers; ++i) all[static_cast<std::size_t>(i)].kept = kept[i];
  const cuda::LinearPlan p =
      cuda::linear_plan({static_cast<Dtype>(dtype), tokens, width, nullptr, false, all.data(), layers});
  const int64_t numbers[] = {p.threads, p.rows_per_warp, p.tile, p.tile_bytes, p.groups, p.blocks};
  for (int64_t number : numbers) *plan++ = number;
}

// plan: fused, threads, vectors, group, shared_bytes, chunks, floats of workspace.
PPNET_TEST_HOOK void ppnet_mlp_plan(int32_t dtype, int64_t tokens, int64_t width, int64_t kept, int gated,
                                    int64_t shared_limit, int64_t* plan) {
  cuda::MlpDecode job{};
  job.dtype = static_cast<Dtype>(dtype);
  job.tokens = tokens;
  job.width = width;
  job.kept = job.rows = kept;
  job.gate = gated ? plan : nullptr;
  const cuda::MlpPlan p = cuda::mlp_plan(job, shared_limit);
  const int64_t numbers[] = {p.fused, p.threads, p.vectors, p.group, p.shared_bytes, p.chunks, cuda::mlp_workspace(job)};
  for (int64_t number : numbers) *plan++ = number;
}

// sizes: B, G, H / G, T, S, Dh, window. plan: tensor_cores, row_tiles, splits, floats of partial.
PPNET_TEST_HOOK void ppnet_decode_plan(int32_t dtype, const int64_t* sizes, int64_t* plan) {
  cuda::AttentionDecode job{};
  job.dtype = static_cast<Dtype>(dtype);
  job.batch = sizes[0], job.groups = job.kv_heads = sizes[1], job.per_group = sizes[2], job.tokens = sizes[3];
  job.keys = sizes[4], job.width = sizes[5], job.window = sizes[6];
  for (int64_t* stride : {job.query_stride, job.key_stride, job.value_stride})
    for (int d = 0; d < 3; ++d) stride[d] = job.width;
  const cuda::DecodePlan p = cuda::decode_plan(job);
  const int64_t numbers[] = {p.tensor_cores, p.row_tiles, p.splits, p.partial};
  for (int64_t number : numbers) *plan++ = number;
}

#endif
