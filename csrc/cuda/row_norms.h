// Launchers of row_norms and its gradient on NVIDIA GPUs. Torch-free: the binding checks, allocates and fills these.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace ppnet::cuda {

// One weight as a matrix whose last axis is contiguous; its stride is in elements. Units are its rows, or its columns;
// the other axis is that of the features. Factors and sums are float, or double for Dtype::f64.
struct RowNormsTensor {
  const void* weight;
  int64_t rows, cols, stride;
  ppnet::Dtype dtype;
  bool columns;       // units are columns
  const void* scale;  // (features) or null: 1
  void* out;          // forward: norms (units); backward: dscale (features), or null
  const void *grad, *norm;  // backward: (units)
  void* unit;         // backward: working memory (units)
  void* dweight;      // backward: contiguous, or null
  void* partial;      // working memory (norm_row_blocks, cols), where the sums are those of columns
};

// Blocks of rows over which columns are summed; from sizes, stride and alignment alone, not from the other tensors.
int64_t norm_row_blocks(const RowNormsTensor& t);

// Asynchronous on `stream` (a cudaStream_t) of `device`. They return a cudaError_t, also where there is no driver.
int row_norms(const RowNormsTensor* tensors, int n, int device, void* stream);
int row_norms_backward(const RowNormsTensor* tensors, int n, int device, void* stream);

}  // namespace ppnet::cuda
