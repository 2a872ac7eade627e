// Kernels with a bug, kBug, and the same without it: the emulator must find every one.
#include "planted.h"

#include "cuda/prim.h"

namespace ppnet::cuda {
namespace {

constexpr int kThreads = 256;

// A barrier is missing between writing and reading.
template <bool kBug>
__global__ void read_after_write(const Arguments arguments) {
  __shared__ float s[kThreads];
  const int t = threadIdx.x;
  s[t] = input<float>(arguments)[t];
  if (!kBug) __syncthreads();
  output<float>(arguments)[t] = s[kThreads - 1 - t];
}

// A barrier is missing between reading and writing anew. Threads that take turns read in time by luck: seeds find it.
template <bool kBug>
__global__ void write_after_read(const Arguments arguments) {
  __shared__ float s[kThreads];
  const int t = threadIdx.x;
  float x = input<float>(arguments)[t];
  for (int round = 0; round < 4; ++round) {
    s[t] = x;
    __syncthreads();
    x = s[t < kThreads - 2 ? t + 1 : t];
    if (!kBug) __syncthreads();
  }
  output<float>(arguments)[t] = x;
}

// Lanes read what other lanes of their warp wrote.
template <bool kBug>
__global__ void warp_synchronous(const Arguments arguments) {
  __shared__ float s[32];
  s[threadIdx.x] = input<float>(arguments)[threadIdx.x];
  if (!kBug) __syncwarp();
  output<float>(arguments)[threadIdx.x] = s[31 - threadIdx.x];
}

// The wait for a copy is missing.
template <bool kBug>
__global__ void missing_wait(const Arguments arguments) {
  __shared__ __align__(16) float s[kThreads * 4];
  const int t = threadIdx.x;
  cp_async<16>(s + 4 * t, input<float>(arguments) + 4 * t);
  cp_async_commit();
  if (!kBug) cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) output<float>(arguments)[4 * t + i] = s[kThreads * 4 - 1 - 4 * t - i];
}

// Two stages in flight: waiting for all but two groups reads a stage too early.
template <bool kBug>
__global__ void pipeline(const Arguments arguments) {
  __shared__ __align__(16) float s[2][32];
  const int t = threadIdx.x;
  const float* a = input<float>(arguments);
  float sum = 0;
  cp_async<4>(&s[0][t], a + t);
  cp_async_commit();
  for (int i = 0; i < arguments.n; ++i) {
    if (i + 1 < arguments.n) cp_async<4>(&s[(i + 1) % 2][t], a + (i + 1) * 32 + t);
    cp_async_commit();
    cp_async_wait<kBug ? 2 : 1>();
    __syncthreads();
    sum += s[i % 2][31 - t];
    __syncthreads();
  }
  output<float>(arguments)[t] = sum;
}

// A copy starts into a buffer that other threads still read. One that arrives as late as it may hides it: seeds find it.
template <bool kBug>
__global__ void copy_too_early(const Arguments arguments) {
  __shared__ float s[64];
  const int t = threadIdx.x;
  float sum = 0;
  cp_async<4>(&s[t], input<float>(arguments) + t);
  for (int i = 0; i < arguments.n; ++i) {
    cp_async_wait_all();
    __syncthreads();
    const float x = s[63 - t];
    if (!kBug) __syncthreads();
    if (i + 1 < arguments.n) cp_async<4>(&s[t], input<float>(arguments) + (i + 1) * 64 + t);
    __syncthreads();
    sum += x;
  }
  output<float>(arguments)[t] = sum;
}

// Element n of s, by an address that the compiler cannot follow, as swizzled ones are.
__device__ float& element(float* s, int n) {
  return *reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(s) + static_cast<uintptr_t>(4LL * n));
}

// `n` is the index that all read or write; kThreads is the first one too far.
template <bool kWrites>
__global__ void static_shared_index(const Arguments arguments) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = 0;
  __syncthreads();
  if (kWrites) element(s, arguments.n) = 1;
  else output<float>(arguments)[threadIdx.x] = element(s, arguments.n);
}

template <bool kWrites>
__global__ void dynamic_shared_index(const Arguments arguments) {
  float* s = dynamic_shared<float>();
  s[threadIdx.x] = 0;
  __syncthreads();
  if (kWrites) s[arguments.n] = 1;
  else output<float>(arguments)[threadIdx.x] = s[arguments.n];
}

__global__ void global_index(const Arguments arguments) {
  output<float>(arguments)[threadIdx.x] = input<float>(arguments)[arguments.n];
}

__global__ void copied_global_index(const Arguments arguments) {
  __shared__ float s[kThreads];
  cp_async<4>(s + threadIdx.x, input<float>(arguments) + arguments.n);
  cp_async_wait_all();
  output<float>(arguments)[threadIdx.x] = s[threadIdx.x];
}

__global__ void copied_shared_write(const Arguments arguments) {
  cp_async<4>(dynamic_shared<float>() + arguments.n, input<float>(arguments));
  cp_async_wait_all();
}

__global__ void divergent_barrier(const Arguments arguments) {
  if (static_cast<int>(threadIdx.x) < arguments.n) __syncthreads();
  else
    __syncthreads();
}

__global__ void early_return(const Arguments arguments) {
  if (static_cast<int>(threadIdx.x) == arguments.n) return;
  __syncthreads();
}

__global__ void late_barrier(const Arguments arguments) {
  if (static_cast<int>(threadIdx.x) == arguments.n) __syncthreads();
}

__global__ void half_a_shuffle(const Arguments arguments) {
  if (static_cast<int>(threadIdx.x) < arguments.n) output<int>(arguments)[0] = __shfl_sync(0xffffffffu, 1, 0);
  __syncthreads();
}

__global__ void returned_lane(const Arguments arguments) {
  if (static_cast<int>(threadIdx.x) < arguments.n) return;
  output<int>(arguments)[0] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void unlike_masks(const Arguments arguments) {
  const bool low = static_cast<int>(threadIdx.x) < arguments.n;
  output<int>(arguments)[0] = __ballot_sync(low ? 0xffffffffu : 0xffff0000u, 1);
}

__global__ void lane_outside_of_mask(const Arguments arguments) {
  if (threadIdx.x < 16) output<int>(arguments)[0] = __shfl_down_sync(0xffffu, 1, arguments.n);
}

__global__ void not_in_own_mask(const Arguments arguments) {
  output<int>(arguments)[0] = __shfl_sync(static_cast<unsigned>(arguments.n), 1, 0);
}

__global__ void unlike_operations(const Arguments arguments) {
  if (static_cast<int>(threadIdx.x) < arguments.n) __syncwarp();
  else
    output<int>(arguments)[0] = __any_sync(0xffffffffu, 1);
}

__global__ void misaligned_copy(const Arguments arguments) {
  __shared__ __align__(16) float s[kThreads];
  cp_async<16>(s + arguments.n, input<float>(arguments));
}

__global__ void misaligned_row(const Arguments arguments) {
  __shared__ __align__(16) uint16_t s[kThreads];
  uint32_t r[1];
  ldmatrix_x1(r, s + arguments.n);
  output<uint32_t>(arguments)[threadIdx.x] = r[0];
}

__global__ void failing_assertion(const Arguments arguments) {
  assert(static_cast<int>(threadIdx.x) != arguments.n && "planted");
}

#define BOTH(kernel, ...) \
  {#kernel, one_block<kernel<false>, __VA_ARGS__>}, { #kernel "!", one_block<kernel<true>, __VA_ARGS__> }

constexpr Case kCases[] = {
    BOTH(read_after_write, kThreads),
    BOTH(write_after_read, kThreads),
    BOTH(warp_synchronous, 32),
    BOTH(missing_wait, kThreads),
    BOTH(pipeline, 32),
    BOTH(copy_too_early, 64),
    {"static_shared_read", one_block<static_shared_index<false>, kThreads>},
    {"static_shared_write", one_block<static_shared_index<true>, kThreads>},
    {"dynamic_shared_read", one_block<dynamic_shared_index<false>, kThreads, kThreads * 4>},
    {"dynamic_shared_write", one_block<dynamic_shared_index<true>, kThreads, kThreads * 4>},
    {"global_read", one_block<global_index, kThreads>},
    {"copied_global_read", one_block<copied_global_index, kThreads>},
    {"copied_shared_write", one_block<copied_shared_write, kThreads, kThreads * 4>},
    {"divergent_barrier", one_block<divergent_barrier, kThreads>},
    {"early_return", one_block<early_return, kThreads>},
    {"late_barrier", one_block<late_barrier, kThreads>},
    {"half_a_shuffle", one_block<half_a_shuffle, 32>},
    {"returned_lane", one_block<returned_lane, 32>},
    {"unlike_masks", one_block<unlike_masks, 32>},
    {"lane_outside_of_mask", one_block<lane_outside_of_mask, 32>},
    {"not_in_own_mask", one_block<not_in_own_mask, 32>},
    {"unlike_operations", one_block<unlike_operations, 32>},
    {"misaligned_copy", one_block<misaligned_copy, 1>},
    {"misaligned_row", one_block<misaligned_row, 32>},
    {"failing_assertion", one_block<failing_assertion, kThreads>},
    {"too_many_threads", one_block<failing_assertion, 2048>},
    {"too_much_shared", one_block<failing_assertion, 32, 228 * 1024>},
};

}  // namespace
}  // namespace ppnet::cuda

extern "C" __attribute__((visibility("default"))) int ppnet_planted_bug(const char* name, const void* a, const void* b,
                                                                        void* out, int n) {
  return ppnet::cuda::run_case(ppnet::cuda::kCases, name, {a, b, out, n});
}
