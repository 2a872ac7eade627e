// Element types as the torch-free kernels name them.
#pragma once

#include <cstdint>

namespace ppnet {

enum class Dtype { f32, bf16, f16, f64 };

// `static`: an inline function with external linkage would be shared between the instruction sets.
static inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

}  // namespace ppnet
