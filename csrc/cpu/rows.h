// Parameters of gather_rows and scatter_rows on the CPU. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "isa.h"

namespace ppnet {

// One tensor, in the orientation in which its last axis is contiguous; strides are in bytes.
// The scale, the dot and the partial sums are float, or double for Dtype::f64.
struct RowsJob {
  Dtype dtype;
  bool columns;           // the index runs along the contiguous axis
  const char* src;        // gather: the full tensor; scatter: the gradient of the kept rows or columns
  int64_t src_stride;
  char* out;              // contiguous; null: scatter computes only the dot
  int64_t rows, cols;     // of the output (of the full tensor where `out` is null)
  int64_t kept, full;     // K, F
  const int32_t* index;   // gather: idx (K); rows of scatter: slot (F), the k of every full row, -1 where none is kept;
                          // columns of scatter: the kept columns (K), increasing
  const int32_t* order;   // columns of scatter: the k of each of `index`; null where that is 0, 1, 2, ...
  const uint64_t* mask;   // columns, where idx is increasing: bit f is set when column f is kept; otherwise null
  const void* scale;      // (K); scatter of columns: (F), 0 where absent; or null
  const char* weight;     // scatter: the full tensor, or null
  int64_t weight_stride;
  void* dot;              // (K), with a weight
  void* partial;          // columns of scatter with a weight: (units, F)
};

// Rows of a unit of columns, the grain in which work is divided. Partial dots of columns are summed per unit, so their
// value does not depend on the number of threads.
constexpr int64_t kColumnUnit = 64;

// Rows of a unit of whole rows: as many as the kernels copy side by side.
constexpr int64_t kRowUnit = 4;

// Columns of kRowUnit rows go through a buffer: this many bytes of each at a time, with room for the 64 columns that
// arrive together and the vector that is stored whole (and rows of the buffer not a power of two apart).
constexpr int64_t kColumnBlock = 512, kColumnScratch = kColumnBlock + 64 * 8 + 128;

// Work on units [begin, end). `scratch` belongs to the thread: kScratchBytes, aligned to a cache line.
// `stream`: the output is larger than the cache, so write around it.
PPNET_KERNEL(void gather_rows(const RowsJob& job, int64_t begin, int64_t end, bool stream, void* scratch))
PPNET_KERNEL(void scatter_rows(const RowsJob& job, int64_t begin, int64_t end, bool stream, void* scratch))
// Columns of scatter: dot[k] = sum over units of partial[unit][idx[k]].
PPNET_KERNEL(void reduce_dot(const RowsJob& job))

// `static`: an inline function with external linkage would be shared between the instruction sets.
static inline int64_t unit_rows(const RowsJob& job) { return job.columns ? kColumnUnit : kRowUnit; }
static inline int64_t units(const RowsJob& job) { return (job.rows + unit_rows(job) - 1) / unit_rows(job); }

constexpr int64_t kScratchBytes = kRowUnit * kColumnScratch;

}  // namespace ppnet
