// Small kernels for test_emulator.py, which finds them by name.
#pragma once

#include "cuda/launch.h"

namespace ppnet::cuda {

// All have float or raw 32-bit input `a` and `b` and output `out` of sizes that the test knows.
struct Arguments {
  const void *a, *b;
  void* out;
  int n;
};

struct Case {
  const char* name;
  cudaError_t (*run)(const Arguments&);
};

template <size_t kCases>
int run_case(const Case (&cases)[kCases], const char* name, const Arguments& arguments) {
  for (const Case& c : cases)
    if (strcmp(c.name, name) == 0) return c.run(arguments);
  return -1;
}

template <class T>
__device__ const T* input(const Arguments& arguments) {
  return static_cast<const T*>(arguments.a);
}
template <class T>
__device__ T* output(const Arguments& arguments) {
  return static_cast<T*>(arguments.out);
}

// One block of kThreads.
template <void (*kKernel)(Arguments), int kThreads, int kSharedBytes = 0>
cudaError_t one_block(const Arguments& arguments) {
  return launch(kKernel, 1, kThreads, kSharedBytes, nullptr, arguments);
}

}  // namespace ppnet::cuda
