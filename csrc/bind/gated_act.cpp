// gated_act and gated_act_backward on the CPU: the schemas are in ppnet/ops/gated_act.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "gated_act_check.h"
#include "memory.h"
#include "rows.h"

namespace ppnet {
namespace {

using Kernel = void (*)(const GatedActJob&, int64_t, int64_t, bool);

// Divides the tiles among the threads. `reads` and `outputs`: tensors of the shape of `up` that move.
void run(const GatedActJob& job, Kernel kernel, int64_t reads, std::initializer_list<char*> outputs) {
  const int64_t bytes = job.rows * job.cols * element_size(job.dtype);
  if (bytes == 0) return;
  const int64_t count = tiles(job);
  int64_t written = 0;
  for (char* out : outputs) {
    advise_large_pages(out, bytes);
    written += out ? bytes : 0;
  }
  const int64_t per_tile = (reads * bytes + written) / count + 1;
  const bool streamed = written > cache_bytes();
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kBytesPerThread / per_tile),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end, streamed); });
}

Tensor gated_act_cpu(Tensor up, std::optional<Tensor> gate, std::optional<Tensor> z, std::string act) {
  ActInputs in = check_gated_act("gated_act", up, gate, z, act, false);
  const Tensor h = torch::stable::new_empty(up, sizes_of(up));
  in.job.h = static_cast<char*>(h.mutable_data_ptr());
  run(in.job, PPNET_PICK(gated_act), gate ? 2 : 1, {in.job.h});
  return h;
}

std::tuple<Tensor, Tensor, Tensor> gated_act_backward_cpu(Tensor dh, Tensor up, std::optional<Tensor> gate,
                                                          std::optional<Tensor> z, std::string act, bool need_up,
                                                          bool need_gate, bool need_z) {
  const char* op = "gated_act_backward";
  ActInputs in = check_gated_act(op, up, gate, z, act, false);
  GatedActJob& job = in.job;
  need_gate = need_gate && gate;
  const ActRows gradient = matching_rows(op, "dh", dh, up);
  job.dh = gradient.data();
  job.dh_stride = gradient.stride;
  const std::vector<int64_t> full = sizes_of(up), none{0};
  const Tensor dup = torch::stable::new_empty(up, need_up ? full : none);
  const Tensor dgate = torch::stable::new_empty(up, need_gate ? full : none);
  const Tensor dz = torch::stable::new_empty(up, {need_z ? job.cols : 0}, arithmetic(up.scalar_type()));
  job.dup = need_up ? static_cast<char*>(dup.mutable_data_ptr()) : nullptr;
  job.dgate = need_gate ? static_cast<char*>(dgate.mutable_data_ptr()) : nullptr;
  std::unique_ptr<char[]> partial;
  if (need_z) {
    partial.reset(new char[static_cast<size_t>(row_blocks(job) * job.cols * (job.dtype == Dtype::f64 ? 8 : 4))]);
    job.partial = partial.get();
    job.dz = dz.mutable_data_ptr();
  }
  if (need_up || need_gate || need_z)
    run(job, PPNET_PICK(gated_act_backward), gate ? 3 : 2, {job.dup, job.dgate});
  if (need_z && job.cols > 0) PPNET_PICK(gated_act_reduce)(job);
  return {dup, dgate, dz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) {
  m.impl("gated_act", TORCH_BOX(&gated_act_cpu));
  m.impl("gated_act_backward", TORCH_BOX(&gated_act_backward_cpu));
}

}  // namespace ppnet
