// rotary on the CPU: the schema is in ppnet/ops/rotary.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "memory.h"
#include "operators.h"

namespace ppnet {

std::tuple<Tensor, Tensor> cpu::rotary(const char* op, Tensor query, Tensor key, Tensor cos, Tensor sin) {
  Tensor y, z;
  const Rotary job = rotary_job(op, query, key, cos, sin, false, y, z);
  const int64_t batch = query.size(0), row = job.width * element_size(job.dtype);
  if (batch * job.tokens * job.width == 0) return {y, z};
  const int64_t per_token = 2 * (query.size(1) + key.size(1) + 1) * row;
  const auto kernel = PPNET_PICK(rotary);
  torch::stable::parallel_for(0, batch * job.tokens, std::max<int64_t>(1, kBytesPerThread / per_token),
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
