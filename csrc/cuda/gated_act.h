// Launchers of gated_act and its backward on NVIDIA GPUs. Torch-free: the binding checks, allocates and fills this.
#pragma once

#include <cstdint>

#include "cpu/act.h"
#include "cpu/dtype.h"

namespace ppnet::cuda {

// Matrices of `rows` tokens and `cols` units whose rows are contiguous; strides are in elements, outputs contiguous.
// z, partial and dz are float, or double for Dtype::f64.
struct GatedAct {
  ppnet::Dtype dtype;
  Act act;
  int64_t rows, cols;
  const void* up;
  int64_t up_stride;
  const void* gate;  // or null: the activation is of `up`
  int64_t gate_stride;
  const void* z;     // (cols), or null
  void* h;           // forward
  const void* dh;    // backward
  int64_t dh_stride;
  void* dup;         // or null: not wanted
  void* dgate;       // or null
  void* dz;          // (cols), or null
  void* partial;     // with dz: (plan.row_blocks, cols), the sums over each block of rows
};

// How a call is divided, from sizes, strides and the alignment of pointers alone.
struct GatedActPlan {
  bool vectors;        // 16 bytes at a time; otherwise one element
  int across;          // threads of a block along the columns: a power of two; the others take further rows
  int64_t col_tiles;   // blocks along the columns
  int64_t row_blocks;  // blocks along the rows
  int64_t block_rows;
};
GatedActPlan gated_act_plan(const GatedAct& job, bool backward);

// Asynchronous on `stream` (a cudaStream_t) of `device`. They return a cudaError_t, also where there is no driver.
int gated_act(const GatedAct& job, int device, void* stream);
int gated_act_backward(const GatedAct& job, int device, void* stream);

}  // namespace ppnet::cuda
