// gated_act and gated_act_backward on the CPU: the schemas are in ppnet/ops/gated_act.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/gated_act.h"
#include "memory.h"

namespace ppnet {
namespace {


ScalarType arithmetic(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

// A tensor (..., K) as the rows of a matrix.
struct Rows {
  Tensor tensor;       // as given, or a contiguous copy where its rows are not evenly spaced or not contiguous
  int64_t stride = 0;  // bytes between rows
  const char* data() const { return static_cast<const char*>(tensor.const_data_ptr()); }
};

Rows rows_of(const Tensor& t, Dtype dtype) {
  const int64_t last = t.dim() - 1;
  bool even = t.size(last) <= 1 || t.stride(last) == 1;
  int64_t stride = t.size(last);  // of the innermost axis with more than one row
  int64_t reach = -1;             // what the next one must have
  for (int64_t d = last - 1; d >= 0 && even; --d) {
    if (t.size(d) == 1) continue;
    if (reach < 0)
      stride = t.stride(d);
    else
      even = t.stride(d) == reach;
    reach = t.stride(d) * t.size(d);
  }
  const int64_t bytes = element_size(dtype);
  if (even) return {t, stride * bytes};
  return {torch::stable::contiguous(t), t.size(last) * bytes};
}

// Arguments that both directions have, checked and as rows.
struct Inputs {
  Rows up, gate;
  Tensor z;
  GatedActJob job{};
};

Rows matching_rows(const char* op, const char* name, const Tensor& t, const Tensor& up) {
  check_cpu(op, name, t);
  PPNET_CHECK(sizes_of(t) == sizes_of(up), op, ": ", name, " has shape ", shape(t), "; it must be that of up = ",
              shape(up));
  check_dtype(op, name, t, up.scalar_type(), "that of up");
  return rows_of(t, dtype_of(up));
}

Inputs check_inputs(const char* op, const Tensor& up, const std::optional<Tensor>& gate, const std::optional<Tensor>& z,
                    const std::string& act) {
  Inputs in;
  check_cpu(op, "up", up);
  check_floating(op, "up", up);
  PPNET_CHECK(up.dim() >= 1, op, ": up has shape (); it must be (..., K)");
  GatedActJob& job = in.job;
  job.act = act_named(op, act);
  job.dtype = dtype_of(up);
  job.cols = up.size(up.dim() - 1);
  job.rows = 1;
  for (int64_t d = 0; d + 1 < up.dim(); ++d) job.rows *= up.size(d);
  in.up = rows_of(up, job.dtype);
  job.up = in.up.data();
  job.up_stride = in.up.stride;
  if (gate) {
    in.gate = matching_rows(op, "gate", *gate, up);
    job.gate = in.gate.data();
    job.gate_stride = in.gate.stride;
  }
  if (z) {
    check_cpu(op, "z", *z);
    check_shape(op, "z", *z, {job.cols}, "(K,)");
    check_dtype(op, "z", *z, arithmetic(up.scalar_type()), "Double for a Double up, else Float");
    in.z = z->is_contiguous() ? *z : torch::stable::contiguous(*z);
    job.z = in.z.const_data_ptr();
  }
  return in;
}

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
  Inputs in = check_inputs("gated_act", up, gate, z, act);
  const Tensor h = torch::stable::new_empty(up, sizes_of(up));
  in.job.h = static_cast<char*>(h.mutable_data_ptr());
  run(in.job, PPNET_PICK(gated_act), gate ? 2 : 1, {in.job.h});
  return h;
}

std::tuple<Tensor, Tensor, Tensor> gated_act_backward_cpu(Tensor dh, Tensor up, std::optional<Tensor> gate,
                                                          std::optional<Tensor> z, std::string act, bool need_up,
                                                          bool need_gate, bool need_z) {
  const char* op = "gated_act_backward";
  Inputs in = check_inputs(op, up, gate, z, act);
  GatedActJob& job = in.job;
  need_gate = need_gate && gate;
  const Rows gradient = matching_rows(op, "dh", dh, up);
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
