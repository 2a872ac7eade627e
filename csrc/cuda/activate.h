// The activations of an MLP in float, chosen at run time.
#pragma once

#include "cpu/act.h"
#include "launch.h"

namespace ppnet::cuda {

// Infinities and NaN as on the CPU: -infinity times 0 is NaN.
__device__ inline float activate(Act act, float x) {
  switch (act) {
    case Act::silu: return x / (1.0f + expf(-x));
    case Act::gelu: return x * (0.5f * erfcf(-0.70710678118654752f * x));
    // 1/2 (1 + tanh y) = 1 / (1 + e^-2y) keeps its relative precision where tanh y is near -1.
    case Act::gelu_tanh: return x / (1.0f + expf(-x * (1.5957691216057308f + 0.071354816272600248f * x * x)));
    case Act::relu: return x < 0.0f ? 0.0f : x;
    default: return x < 0.0f ? 0.0f : x * x;  // relu2
  }
}

}  // namespace ppnet::cuda
