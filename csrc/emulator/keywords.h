// Keywords of CUDA C++ and the variables that every thread has.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// A static variable, filled with poison before every block. The marker before it tells which functions have one
// (symbols.cpp). `extern __shared__` does not compile: see dynamic_shared().
#define __shared__ PPNET_SHARED(__COUNTER__)
#define PPNET_SHARED(n) PPNET_SHARED_MARKED(n)
#define PPNET_SHARED_MARKED(n)                 \
  static char ppnet_shared_##n;                \
  asm volatile("" : : "m"(ppnet_shared_##n)); \
  static

#define threadIdx (::ppnet::emulator::current->index)
#define blockIdx (::ppnet::emulator::block.index)
#define blockDim (::ppnet::emulator::block.shape)
#define gridDim (::ppnet::emulator::block.grid)
constexpr int warpSize = 32;

#undef assert
#define assert(condition)                                                                                  \
  ((condition) ? void()                                                                                    \
               : ::ppnet::emulator::fail(*::ppnet::emulator::current, ::ppnet::emulator::Where::here(), \
                                         "assertion failed: %s", #condition))
