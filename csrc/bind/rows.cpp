// gather_rows and scatter_rows on the CPU: the schemas are in ppnet/ops/rows.py.
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include "check.h"
#include "cpu/rows.h"
#include "rows_share.h"

namespace ppnet {
namespace {

// Arrays that a job points to.
struct JobArrays {
  std::vector<int32_t> index, order;
  std::vector<uint64_t> mask;
  std::vector<char> scale, partial;
};

// The kept columns in increasing order, and the k of each.
void sort_columns(const std::vector<int32_t>& slot, JobArrays& arrays) {
  arrays.index.clear();
  for (size_t f = 0; f < slot.size(); ++f) {
    if (slot[f] < 0) continue;
    arrays.index.push_back(static_cast<int32_t>(f));
    arrays.order.push_back(slot[f]);
  }
}

// Reads idx[i]: range, and for scatter uniqueness; fills the forms the kernels index with.
void read_idx(const char* op, size_t i, const RowsItem& item, bool scatter, RowsJob& job, JobArrays& arrays) {
  PPNET_CHECK(item.full <= INT32_MAX, op, ": tensor ", i, " has size ", item.full,
              " along its indexed dim; at most ", INT32_MAX, " is supported");
  const int64_t* idx = item.idx.const_data_ptr<int64_t>();
  std::vector<int32_t> slot(scatter ? static_cast<size_t>(item.full) : 0, -1);
  arrays.index.resize(static_cast<size_t>(item.kept));
  bool increasing = true;
  for (int64_t k = 0; k < item.kept; ++k) {
    const int64_t f = idx[k];
    PPNET_CHECK(f >= 0 && f < item.full, op, ": idx[", i, "][", k, "] is ", f, "; allowed are 0 .. ", item.full - 1,
                " (size ", item.full, " along the indexed dim)");
    increasing = increasing && (k == 0 || f > idx[k - 1]);
    arrays.index[static_cast<size_t>(k)] = static_cast<int32_t>(f);
    if (!scatter) continue;
    PPNET_CHECK(slot[static_cast<size_t>(f)] < 0, op, ": idx[", i, "] has ", f, " at positions ",
                slot[static_cast<size_t>(f)], " and ", k, "; its values must be unique");
    slot[static_cast<size_t>(f)] = static_cast<int32_t>(k);
  }
  if (job.columns && increasing) {
    arrays.mask.assign(static_cast<size_t>(item.full / 64 + 1), 0);
    for (int32_t f : arrays.index) arrays.mask[static_cast<size_t>(f / 64)] |= uint64_t{1} << (f % 64);
    job.mask = arrays.mask.data();
  }
  if (scatter && !job.columns) arrays.index = std::move(slot);
  else if (scatter && !increasing) sort_columns(slot, arrays);
  job.index = arrays.index.data();
  if (!arrays.order.empty()) job.order = arrays.order.data();
}

// The scale of scattered columns in the positions of the full row.
template <class C>
void spread_scale(const RowsItem& item, const RowsJob& job, JobArrays& arrays) {
  arrays.scale.assign(static_cast<size_t>(item.full) * sizeof(C), 0);
  auto* full = reinterpret_cast<C*>(arrays.scale.data());
  const auto* scale = static_cast<const C*>(item.scale->const_data_ptr());
  for (int64_t k = 0; k < item.kept; ++k) full[job.index[k]] = scale[job.order ? job.order[k] : k];
}

RowsJob make_job(const char* op, size_t i, const RowsItem& item, bool scatter, JobArrays& arrays) {
  RowsJob job{};
  job.dtype = dtype_of(item.src.tensor);
  const int64_t bytes = element_size(job.dtype);
  job.columns = item.src.columns;
  job.src = static_cast<const char*>(item.src.tensor.const_data_ptr());
  job.src_stride = item.src.stride * bytes;
  job.out = item.writes_out ? static_cast<char*>(item.out.mutable_data_ptr()) : nullptr;
  const int64_t n = scatter ? item.full : item.kept;
  job.rows = job.columns ? item.src.rows : n;
  job.cols = job.columns ? n : item.src.cols;
  job.kept = item.kept;
  job.full = item.full;
  read_idx(op, i, item, scatter, job, arrays);
  if (item.scale) {
    job.scale = item.scale->const_data_ptr();
    if (scatter && job.columns) {
      job.dtype == Dtype::f64 ? spread_scale<double>(item, job, arrays) : spread_scale<float>(item, job, arrays);
      job.scale = arrays.scale.data();
    }
  }
  if (item.has_weight) {
    job.weight = static_cast<const char*>(item.weight.tensor.const_data_ptr());
    job.weight_stride = item.weight.stride * bytes;
    job.dot = item.dot.mutable_data_ptr();
    if (job.columns) {
      // Not empty even where there are no rows: `partial` also says that the dots are to be summed, if only to 0.
      arrays.partial.resize(
          static_cast<size_t>(std::max<int64_t>(units(job) * job.cols * (job.dtype == Dtype::f64 ? 8 : 4), 1)));
      job.partial = arrays.partial.data();
    }
  }
  return job;
}

struct Scratch {
  alignas(64) char bytes[kScratchBytes];
};

// Memory traffic of one unit: what the work is divided by. Never 0: rows of no width have dots.
int64_t unit_bytes(const RowsJob& job, bool scatter) {
  const int64_t full = job.cols, kept = job.columns ? job.kept : job.cols;
  const int64_t read = job.columns && !scatter ? job.full : kept;
  const int64_t bytes = unit_rows(job) * element_size(job.dtype) * (full + read + (job.weight ? full : 0));
  return std::max<int64_t>(bytes, 1);
}

using Kernel = void (*)(const RowsJob&, int64_t, int64_t, bool, void*);

void run(const std::vector<RowsJob>& jobs, bool scatter, Kernel kernel) {
  std::vector<Load> loads;
  int64_t out_bytes = 0;
  for (const RowsJob& job : jobs) {
    loads.push_back({units(job), unit_bytes(job, scatter)});
    const int64_t bytes = job.out ? job.rows * job.cols * element_size(job.dtype) : 0;
    advise_large_pages(job.out, bytes);
    out_bytes += bytes;
  }
  const bool stream = out_bytes > cache_bytes();
  share(loads, [&] {
    return [&, scratch = Scratch{}](size_t i, int64_t first, int64_t last) mutable {
      kernel(jobs[i], first, last, stream, scratch.bytes);
    };
  });
}

Tensors gather_rows_cpu(Tensors src, Tensors idx, Tensors scale, std::vector<int64_t> dim) {
  const std::vector<RowsItem> items = gather_items(src, idx, scale, dim, false);
  std::vector<JobArrays> arrays(items.size());
  std::vector<RowsJob> jobs;
  Tensors out;
  for (size_t i = 0; i < items.size(); ++i) {
    jobs.push_back(make_job("gather_rows", i, items[i], false, arrays[i]));
    out.push_back(items[i].out);
  }
  run(jobs, false, PPNET_PICK(gather_rows));
  return out;
}

std::tuple<Tensors, Tensors> scatter_rows_cpu(Tensors grad, Tensors idx, Tensors scale, std::vector<int64_t> dim,
                                              std::vector<int64_t> size, Tensors weight) {
  const std::vector<RowsItem> items = scatter_items(grad, idx, scale, dim, size, weight, false);
  std::vector<JobArrays> arrays(items.size());
  std::vector<RowsJob> jobs;
  Tensors out, dot;
  for (size_t i = 0; i < items.size(); ++i) {
    jobs.push_back(make_job("scatter_rows", i, items[i], true, arrays[i]));
    out.push_back(items[i].out);
    dot.push_back(items[i].dot);
  }
  run(jobs, true, PPNET_PICK(scatter_rows));
  for (const RowsJob& job : jobs)
    if (job.partial && job.kept > 0) PPNET_PICK(reduce_dot)(job);
  return {out, dot};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppnet, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&gather_rows_cpu));
  m.impl("scatter_rows", TORCH_BOX(&scatter_rows_cpu));
}

}  // namespace ppnet
