// Kernels that show what each primitive gives, register for register, and a tile of a matrix product made of them.
#include "planted.h"

#include "cuda/prim.h"

namespace ppnet::cuda {
namespace {

// out[lane] = d of lane; a: (32, 4), b: (32, 2), out: (32, 4), in registers.
template <class T>
__global__ void mma(const Arguments arguments) {
  const int lane = threadIdx.x;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = output<float>(arguments)[4 * lane + i];
  mma_m16n8k16<T>(d, input<uint32_t>(arguments) + 4 * lane, static_cast<const uint32_t*>(arguments.b) + 2 * lane);
  for (int i = 0; i < 4; ++i) output<float>(arguments)[4 * lane + i] = d[i];
}

// a: 64 rows of 16 bytes; b[lane]: which of them that lane names. out: (32, 4) registers.
template <void (*kLoad)(uint32_t*, const void*)>
__global__ void load(const Arguments arguments) {
  __shared__ __align__(16) uint32_t rows[64 * 4];
  const int lane = threadIdx.x;
  for (int i = lane; i < 64 * 4; i += 32) rows[i] = input<uint32_t>(arguments)[i];
  __syncwarp();
  uint32_t r[4] = {};
  kLoad(r, rows + 4 * static_cast<const int*>(arguments.b)[lane]);
  for (int i = 0; i < 4; ++i) output<uint32_t>(arguments)[4 * lane + i] = r[i];
}

#define LOAD(name)                                                                          \
  __device__ void name##_registers(uint32_t* r, const void* row) { ldmatrix_##name(r, row); }
LOAD(x1)
LOAD(x2)
LOAD(x4)
LOAD(x1_trans)
LOAD(x2_trans)
LOAD(x4_trans)

// The first `n` of kBytes bytes of every thread's part of a, zeros after; the parts are 16 bytes apart.
template <int kBytes>
__global__ void copy(const Arguments arguments) {
  char* s = dynamic_shared<char>() + 16 * threadIdx.x;
  for (int i = 0; i < 16; ++i) s[i] = 99;
  cp_async<kBytes>(s, input<char>(arguments) + 16 * threadIdx.x, arguments.n);
  cp_async_wait_all();
  for (int i = 0; i < 16; ++i) output<char>(arguments)[16 * threadIdx.x + i] = s[i];
}

// out (64, 64) = a (64, n) · b (n, 64), a of T, 4 warps; k in stages of 32 of which two are in flight.
template <class T>
__global__ void __launch_bounds__(128) tile(const Arguments arguments) {
  constexpr int kStage = 32, kPitchA = kStage + 8, kPitchB = 64 + 8;  // padded by 16 bytes against bank conflicts
  T* shared_a = dynamic_shared<T>();
  T* shared_b = shared_a + 2 * 64 * kPitchA;
  const T* a = input<T>(arguments);
  const T* b = static_cast<const T*>(arguments.b);
  const int n = arguments.n, t = threadIdx.x, warp = t / 32, lane = t % 32;
  const auto start = [&](int stage) {
    T* sa = shared_a + stage % 2 * 64 * kPitchA;
    T* sb = shared_b + stage % 2 * kStage * kPitchB;
    for (int i = t; i < 64 * kStage / 8; i += 128) {
      const int row = i / (kStage / 8), col = i % (kStage / 8) * 8;
      cp_async<16>(sa + row * kPitchA + col, a + row * n + stage * kStage + col);
    }
    for (int i = t; i < kStage * 64 / 8; i += 128) {
      const int row = i / 8, col = i % 8 * 8;
      cp_async<16>(sb + row * kPitchB + col, b + (stage * kStage + row) * 64 + col);
    }
  };
  float d[8][4] = {};
  start(0);
  cp_async_commit();
  for (int stage = 0; stage < n / kStage; ++stage) {
    if (stage + 1 < n / kStage) start(stage + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const T* sa = shared_a + stage % 2 * 64 * kPitchA;
    const T* sb = shared_b + stage % 2 * kStage * kPitchB;
    for (int k = 0; k < kStage; k += 16) {
      uint32_t ra[4];
      ldmatrix_x4(ra, sa + (warp * 16 + lane % 16) * kPitchA + k + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t rb[4];
        ldmatrix_x4_trans(rb, sb + (k + lane % 16) * kPitchB + j * 8 + lane / 16 * 8);
        mma_m16n8k16<T>(d[j], ra, rb);
        mma_m16n8k16<T>(d[j + 1], ra, rb + 2);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      output<float>(arguments)[(warp * 16 + lane / 4 + i / 2 * 8) * 64 + j * 8 + lane % 4 * 2 + i % 2] = d[j][i];
}

// Per lane: shfl, up, down, xor of n with each width 1 .. 32.
template <class T>
__global__ void shuffles(const Arguments arguments) {
  const int lane = threadIdx.x, n = arguments.n;
  const T x = input<T>(arguments)[lane];
  T* out = output<T>(arguments) + lane;
  for (int width = 1; width <= 32; width *= 2, out += 4 * 32) {
    out[0] = __shfl_sync(0xffffffffu, x, n, width);
    out[32] = __shfl_up_sync(0xffffffffu, x, n, width);
    out[64] = __shfl_down_sync(0xffffffffu, x, n, width);
    out[96] = __shfl_xor_sync(0xffffffffu, x, n, width);
  }
}

// Half of the warp at a time, each half with its own mask.
__global__ void votes(const Arguments arguments) {
  const int lane = threadIdx.x, yes = input<int>(arguments)[lane];
  unsigned* out = output<unsigned>(arguments) + 8 * lane;
  const unsigned mask = lane < 16 ? 0xffffu : 0xffff0000u;
  out[0] = __ballot_sync(mask, yes);
  out[1] = __any_sync(mask, yes) != 0;
  out[2] = __all_sync(mask, yes) != 0;
  out[3] = __activemask();
  out[4] = static_cast<unsigned>(__reduce_add_sync(mask, yes));
  out[5] = static_cast<unsigned>(__syncthreads_count(yes));
  out[6] = __syncthreads_or(yes) != 0;
  out[7] = __syncthreads_and(yes) != 0;
}

struct Counters {
  int add, low, high, lock, guarded;
  unsigned exchanged, wrapped;
  float real;
  double precise;
  unsigned long long wide, last;
};

__global__ void atomics(const Arguments arguments) {
  Counters& c = *output<Counters>(arguments);
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&c.add, 1);
  atomicMin(&c.low, -t);
  atomicMax(&c.high, t);
  atomicInc(&c.wrapped, 9u);
  atomicAdd(&c.real, 0.5f);
  atomicAdd(&c.precise, 0.25);
  atomicAdd(&c.wide, 1ull << 33);
  if (atomicExch(&c.exchanged, 1u) == 0u) atomicAdd(&c.last, 7ull);
  if (threadIdx.x % 32 == 0) {  // a lock, taken by one lane of each warp
    while (atomicCAS(&c.lock, 0, 1) != 0) {}
    const int before = c.guarded;
    __threadfence();
    c.guarded = before + 1;
    __threadfence();
    atomicExch(&c.lock, 0);
  }
}

// out[place of the thread in the grid] = its coordinates.
__global__ void places(const Arguments arguments) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  output<unsigned>(arguments)[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z + 1000 * threadIdx.x + 10000 * threadIdx.y + 100000 * threadIdx.z;
}

// Sums n floats through dynamic shared memory, which is poisoned at first.
__global__ void shared_sum(const Arguments arguments) {
  float* s = dynamic_shared<float>();
  if (blockIdx.x == 0 && threadIdx.x == 0) output<float>(arguments)[1] = s[arguments.n - 1];
  __syncthreads();
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  for (int i = first; i < arguments.n; i += step) s[i] = input<float>(arguments)[i];
  __syncthreads();
  float sum = 0;
  for (int i = 0; threadIdx.x == 0 && i < arguments.n; ++i) sum += s[i];
  if (threadIdx.x == 0) output<float>(arguments)[0] = sum;
}

// out[i] = a[i] in T and back, as 16-bit values in the lower halves.
template <class T>
__global__ void rounding(const Arguments arguments) {
  for (int i = static_cast<int>(threadIdx.x); i < arguments.n; i += 32)
    output<uint32_t>(arguments)[i] = pack<T>(input<float>(arguments)[i], 0.0f);
}

template <class T>
__global__ void widening(const Arguments arguments) {
  for (int i = static_cast<int>(threadIdx.x); i < arguments.n; i += 32)
    output<float>(arguments)[i] = unpack<T>(input<uint32_t>(arguments)[i]).x;
}

constexpr int kTileBytes = 2 * (64 * 40 + 32 * 72) * 2;

constexpr Case kCases[] = {
    {"mma_f16", one_block<mma<__half>, 32>},
    {"mma_bf16", one_block<mma<__nv_bfloat16>, 32>},
    {"ldmatrix_x1", one_block<load<x1_registers>, 32>},
    {"ldmatrix_x2", one_block<load<x2_registers>, 32>},
    {"ldmatrix_x4", one_block<load<x4_registers>, 32>},
    {"ldmatrix_x1_trans", one_block<load<x1_trans_registers>, 32>},
    {"ldmatrix_x2_trans", one_block<load<x2_trans_registers>, 32>},
    {"ldmatrix_x4_trans", one_block<load<x4_trans_registers>, 32>},
    {"copy_4", one_block<copy<4>, 64, 64 * 16>},
    {"copy_8", one_block<copy<8>, 64, 64 * 16>},
    {"copy_16", one_block<copy<16>, 64, 64 * 16>},
    {"tile_f16", one_block<tile<__half>, 128, kTileBytes>},
    {"tile_bf16", one_block<tile<__nv_bfloat16>, 128, kTileBytes>},
    {"shuffles_int", one_block<shuffles<int>, 32>},
    {"shuffles_long", one_block<shuffles<long long>, 32>},
    {"shuffles_float", one_block<shuffles<float>, 32>},
    {"shuffles_double", one_block<shuffles<double>, 32>},
    {"votes", one_block<votes, 32>},
    {"atomics", [](const Arguments& a) { return launch(atomics, 3, 128, 0, nullptr, a); }},
    {"places", [](const Arguments& a) { return launch(places, dim3(2, 3, 4), dim3(5, 3, 2), 0, nullptr, a); }},
    {"shared_sum", one_block<shared_sum, 64, 100 * 1024>},
    {"rounding_f16", one_block<rounding<__half>, 32>},
    {"rounding_bf16", one_block<rounding<__nv_bfloat16>, 32>},
    {"widening_f16", one_block<widening<__half>, 32>},
    {"widening_bf16", one_block<widening<__nv_bfloat16>, 32>},
};

}  // namespace
}  // namespace ppnet::cuda

extern "C" __attribute__((visibility("default"))) int ppnet_planted_prim(const char* name, const void* a, const void* b,
                                                                         void* out, int n) {
  return ppnet::cuda::run_case(ppnet::cuda::kCases, name, {a, b, out, n});
}
