// row_norms and row_norms_backward on the CPU: the schemas are in ppnet/ops/row_norms.py.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "cpu/row_norms.h"
#include "row_norms_check.h"
#include "rows_share.h"

namespace ppnet {
namespace {

RowNormsJob make_job(const NormItem& item) {
  RowNormsJob job{};
  job.dtype = dtype_of(item.matrix.tensor);
  job.weight = static_cast<const char*>(item.matrix.tensor.const_data_ptr());
  job.stride = item.matrix.stride * element_size(job.dtype);
  job.rows = item.matrix.rows;
  job.cols = item.matrix.cols;
  return job;
}

int64_t sum_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

void make_partial(RowNormsJob& job, std::vector<char>& partial) {
  // Not empty even where there are no columns: `partial` also says what the units are.
  partial.resize(static_cast<size_t>(std::max<int64_t>(norm_blocks(job) * job.cols * sum_size(job.dtype), 1)));
  job.partial = partial.data();
}

Load load_of(const RowNormsJob& job) {
  const int64_t all = job.rows * job.cols * element_size(job.dtype) * (job.dweight ? 2 : 1);
  const int64_t units = norm_units(job);
  return {units, units ? std::max<int64_t>(all / units, 1) : 1};
}

// body of the dtype of the sums.
template <class Body>
void with_sums(Dtype dtype, const Body& body) {
  dtype == Dtype::f64 ? body(double()) : body(float());
}

// to[c] = sum over blocks, in their order.
template <class C>
void add_blocks(const RowNormsJob& job, C* to) {
  const C* partial = static_cast<const C*>(job.partial);
  std::fill(to, to + job.cols, C(0));
  for (int64_t block = 0; block < norm_blocks(job); ++block, partial += job.cols)
    for (int64_t c = 0; c < job.cols; ++c) to[c] += partial[c];
}

Tensors row_norms_cpu(Tensors weight, Tensors scale, std::vector<int64_t> dim) {
  const std::vector<NormItem> items = check_row_norms("row_norms", weight, scale, dim, false);
  std::vector<RowNormsJob> jobs;
  std::vector<Load> loads;
  std::vector<std::vector<char>> partial(items.size());
  Tensors out;
  for (size_t i = 0; i < items.size(); ++i) {
    const NormItem& item = items[i];
    RowNormsJob job = make_job(item);
    out.push_back(torch::stable::new_empty(weight[i], {item.units()}, arithmetic(weight[i].scalar_type())));
    const void* factor = item.scaled ? item.scale.const_data_ptr() : nullptr;
    if (item.matrix.columns) {
      job.row_factor = factor;
      make_partial(job, partial[i]);
    } else {
      job.col_factor = factor;
      job.sums = out[i].mutable_data_ptr();
    }
    loads.push_back(load_of(job));
    jobs.push_back(job);
  }
  const auto kernel = PPNET_PICK(row_norms);
  share(loads, [&] { return [&](size_t i, int64_t first, int64_t last) { kernel(jobs[i], first, last); }; });
  for (size_t i = 0; i < items.size(); ++i)
    with_sums(jobs[i].dtype, [&](auto zero) {
      auto* norm = static_cast<decltype(zero)*>(out[i].mutable_data_ptr());
      if (jobs[i].partial) add_blocks(jobs[i], norm);
      if (is_absolute(jobs[i])) return;
      for (int64_t u = 0; u < items[i].units(); ++u) norm[u] = std::sqrt(norm[u]);
    });
  return out;
}

// What the gradients multiply with: grad / norm of every unit (0 where the norm is 0), and scale^2 of every feature.
struct Factors {
  std::vector<char> unit, feature, partial;
};

template <class C>
void make_factors(const NormItem& item, const Tensor& grad, const Tensor& norm, Factors& factors) {
  factors.unit.resize(static_cast<size_t>(item.units()) * sizeof(C));
  auto* unit = reinterpret_cast<C*>(factors.unit.data());
  const C *g = static_cast<const C*>(grad.const_data_ptr()), *n = static_cast<const C*>(norm.const_data_ptr());
  for (int64_t u = 0; u < item.units(); ++u) unit[u] = n[u] == 0 ? C(0) : g[u] / n[u];
  if (!item.scaled) return;
  factors.feature.resize(static_cast<size_t>(item.features()) * sizeof(C));
  auto* feature = reinterpret_cast<C*>(factors.feature.data());
  const C* s = static_cast<const C*>(item.scale.const_data_ptr());
  for (int64_t d = 0; d < item.features(); ++d) feature[d] = s[d] * s[d];
}

RowNormsJob make_backward_job(const NormItem& item, Factors& factors, const Tensor* dweight, const Tensor* dscale) {
  RowNormsJob job = make_job(item);
  const void *unit = factors.unit.data(), *feature = item.scaled ? factors.feature.data() : nullptr;
  job.row_factor = item.matrix.columns ? feature : unit;
  job.col_factor = item.matrix.columns ? unit : feature;
  if (dweight) job.dweight = static_cast<char*>(dweight->mutable_data_ptr());
  // The sums over the units are those of columns where the units are rows.
  if (dscale && item.matrix.columns) job.sums = dscale->mutable_data_ptr();
  if (dscale && !item.matrix.columns) make_partial(job, factors.partial);
  return job;
}

std::tuple<Tensors, Tensors> row_norms_backward_cpu(Tensors grad, Tensors norm, Tensors weight, Tensors scale,
                                                    std::vector<int64_t> dim, bool needs_weight, bool needs_scale) {
  const char* op = "row_norms_backward";
  const std::vector<NormItem> items = check_row_norms(op, weight, scale, dim, false);
  check_lengths(op, weight.size(), "weight", {{"grad", grad.size()}, {"norm", norm.size()}});
  std::vector<Factors> factors(items.size());
  std::vector<RowNormsJob> jobs;
  std::vector<Load> loads;
  Tensors dweight, dscale;
  int64_t out_bytes = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const NormItem& item = items[i];
    const ScalarType sums = arithmetic(weight[i].scalar_type());
    check_unit_gradient(op, i, item, grad[i], norm[i], weight[i]);
    with_sums(dtype_of(weight[i]),
              [&](auto zero) { make_factors<decltype(zero)>(item, grad[i], norm[i], factors[i]); });
    const bool with_scale = needs_scale && item.scaled;
    const Tensor dw = new_weight_gradient(item, needs_weight);
    dscale.push_back(torch::stable::new_empty(weight[i], {with_scale ? item.features() : 0}, sums));
    jobs.push_back(
        make_backward_job(item, factors[i], needs_weight ? &dw : nullptr, with_scale ? &dscale[i] : nullptr));
    const int64_t bytes = needs_weight ? jobs[i].rows * jobs[i].cols * element_size(jobs[i].dtype) : 0;
    advise_large_pages(jobs[i].dweight, bytes);
    out_bytes += bytes;
    loads.push_back(needs_weight || with_scale ? load_of(jobs[i]) : Load{0, 1});
    dweight.push_back(needs_weight && item.matrix.transposed ? torch::stable::transpose(dw, 0, 1) : dw);
  }
  const bool stream = out_bytes > cache_bytes();
  const auto kernel = PPNET_PICK(row_norms_backward);
  share(loads, [&] { return [&](size_t i, int64_t first, int64_t last) { kernel(jobs[i], first, last, stream); }; });
  for (size_t i = 0; i < items.size(); ++i) {
    if (!needs_scale || !items[i].scaled) continue;
    with_sums(jobs[i].dtype, [&](auto zero) {
      using C = decltype(zero);
      auto* ds = static_cast<C*>(dscale[i].mutable_data_ptr());
      const C* s = static_cast<const C*>(items[i].scale.const_data_ptr());
      if (jobs[i].partial) add_blocks(jobs[i], ds);
      for (int64_t d = 0; d < items[i].features(); ++d) ds[d] *= s[d];
    });
  }
  return {dweight, dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) {
  m.impl("row_norms", TORCH_BOX(&row_norms_cpu));
  m.impl("row_norms_backward", TORCH_BOX(&row_norms_backward_cpu));
}

}  // namespace ppnet
