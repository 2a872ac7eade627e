// Checks of gated_act and its backward, and their tensors as rows.
#include "gated_act_check.h"

#include "rows.h"

namespace ppnet {

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

static ActRows rows_of(const Tensor& t, Dtype dtype) {
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

ActRows matching_rows(const char* op, const char* name, const Tensor& t, const Tensor& up) {
  check_same_device(op, name, t, up);
  PPNET_CHECK(sizes_of(t) == sizes_of(up), op, ": ", name, " has shape ", shape(t), "; it must be that of up = ",
              shape(up));
  check_dtype(op, name, t, up.scalar_type(), "that of up");
  return rows_of(t, dtype_of(up));
}

ActInputs check_gated_act(const char* op, const Tensor& up, const std::optional<Tensor>& gate,
                          const std::optional<Tensor>& z, const std::string& act, bool cuda) {
  ActInputs in;
  check_kernel_device(op, "up", up, cuda);
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
    check_same_device(op, "z", *z, up);
    check_shape(op, "z", *z, {job.cols}, "(K,)");
    check_dtype(op, "z", *z, arithmetic(up.scalar_type()), "Double for a Double up, else Float");
    in.z = z->is_contiguous() ? *z : torch::stable::contiguous(*z);
    job.z = in.z.const_data_ptr();
  }
  return in;
}

}  // namespace ppnet
