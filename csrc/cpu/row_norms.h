// Parameters of row_norms and its gradient on the CPU. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "isa.h"

namespace ppnet {

// One weight as a matrix whose last axis is contiguous; its stride is in bytes. Units are its rows, or its columns.
// All factors and sums are float, or double for Dtype::f64.
struct RowNormsJob {
  Dtype dtype;
  const char* weight;
  int64_t stride, rows, cols;
  const void* row_factor;  // (rows) or null: 1
  const void* col_factor;  // (cols) or null: 1
  void* sums;              // of every row (rows), or null
  void* partial;           // sums of every column, per block of rows (blocks, cols), or null
  char* dweight;           // gradient: contiguous, or null
};

// Rows are summed one by one; columns over blocks of rows, in strips whose sums stay in the first-level cache. What is
// summed in one go depends on nothing but the shape, so no result depends on the number of threads.
constexpr int64_t kNormRows = 4, kBlockRows = 256, kStripCols = 2048;

static inline int64_t norm_blocks(const RowNormsJob& job) { return (job.rows + kBlockRows - 1) / kBlockRows; }
static inline int64_t norm_strips(const RowNormsJob& job) { return (job.cols + kStripCols - 1) / kStripCols; }
static inline int64_t norm_units(const RowNormsJob& job) {
  return job.partial ? norm_blocks(job) * norm_strips(job) : (job.rows + kNormRows - 1) / kNormRows;
}

// A vector has no features: its norms are absolute values, and the kernel leaves them in `partial`.
static inline bool is_absolute(const RowNormsJob& job) { return job.partial && job.rows == 1 && !job.row_factor; }

// Of units [begin, end). Forward: the sums of (weight * row_factor * col_factor)^2 over rows or columns.
PPNET_KERNEL(void row_norms(const RowNormsJob& job, int64_t begin, int64_t end))
// dweight = weight * row_factor * col_factor; the sums are of weight^2 * row_factor over a column, or of
// weight^2 * col_factor over a row. `stream`: the output is larger than the cache, so write around it.
PPNET_KERNEL(void row_norms_backward(const RowNormsJob& job, int64_t begin, int64_t end, bool stream))

}  // namespace ppnet
