// Parameters of gated_act and its backward on the CPU. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include <cstdint>

#include "cpu/act.h"
#include "cpu/dtype.h"
#include "isa.h"

namespace ppnet {

// Matrices of `rows` tokens and `cols` units whose rows are contiguous; strides are in bytes, outputs are contiguous.
// z, partial and dz are float, or double for Dtype::f64.
struct GatedActJob {
  Dtype dtype;
  Act act;
  int64_t rows, cols;
  const char* up;
  int64_t up_stride;
  const char* gate;  // or null: the activation is of `up`
  int64_t gate_stride;
  const void* z;  // (cols), or null
  char* h;        // forward
  const char* dh;  // backward
  int64_t dh_stride;
  char* dup;      // or null: not wanted
  char* dgate;    // or null
  void* dz;       // (cols), or null
  void* partial;  // with dz: (row_blocks, cols), the sums over each block of rows
};

// The grain in which work is divided: kActRows rows, whole where there are many (memory is then read and written in
// order: 75 % of copy bandwidth, in tiles of 2048 columns 54 %). dz is summed within blocks of rows and then over the
// blocks in a fixed tree, so its value does not depend on the number of threads.
constexpr int64_t kActRows = 32;
constexpr int64_t kActCols = 1024;

// Work on tiles [begin, end), block of rows by block of rows. `streamed`: the outputs are larger than the
// cache, so write around it.
PPNET_KERNEL(void gated_act(const GatedActJob& job, int64_t begin, int64_t end, bool streamed))
PPNET_KERNEL(void gated_act_backward(const GatedActJob& job, int64_t begin, int64_t end, bool streamed))
// dz = the sum of `partial`, which it overwrites.
PPNET_KERNEL(void gated_act_reduce(const GatedActJob& job))

// `static`: an inline function with external linkage would be shared between the instruction sets.
static inline int64_t row_blocks(const GatedActJob& job) { return (job.rows + kActRows - 1) / kActRows; }
static inline int64_t tile_cols(const GatedActJob& job) {
  return row_blocks(job) >= 16 || job.cols < kActCols ? job.cols : kActCols;
}
static inline int64_t col_blocks(const GatedActJob& job) { return (job.cols + tile_cols(job) - 1) / tile_cols(job); }
static inline int64_t tiles(const GatedActJob& job) { return row_blocks(job) * col_blocks(job); }

}  // namespace ppnet
