// Tensor-core and asynchronous-copy instructions: PTX under nvcc, the same lane for lane under g++ (emulator/prim.h).
// All 32 lanes of a warp must call mma_* and ldmatrix_* together.
//
// With g = lane / 4 and i = lane % 4, a lane holds of the m16n8k16 product's operands, two 16-bit values to a register,
// the lower column (a) or row (b) in the lower half:
//   a (16 x 16): a[0] row g, columns 2i, 2i + 1; a[1] row g + 8, the same; a[2] row g, columns 2i + 8, 2i + 9;
//                a[3] row g + 8, the same
//   b (16 x 8):  b[0] rows 2i, 2i + 1, column g; b[1] rows 2i + 8, 2i + 9
//   d (16 x 8):  d[0], d[1] row g, columns 2i, 2i + 1; d[2], d[3] row g + 8
// ldmatrix: lanes 8m .. 8m + 7 name the eight 16-byte rows of 8 x 8 matrix m, of which every lane receives in r[m]
// row g, columns 2i and 2i + 1; with _trans rows 2i and 2i + 1 of column g.
#pragma once

#include <cstdint>

#include "launch.h"

#ifndef __CUDACC__
#include "emulator/prim.h"
#endif

namespace ppnet::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// d += a · b in float; T: __half or __nv_bfloat16.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
  static_assert(__is_same(T, __half) || __is_same(T, __nv_bfloat16), "a and b are __half or __nv_bfloat16");
  if constexpr (__is_same(T, __half))
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// `row`: shared, aligned to 16 bytes; x1 reads those of lanes 0 .. 7, x2 of 0 .. 15, x4 of all.
__device__ __forceinline__ void ldmatrix_x1(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Starts to copy kBytes (4, 8 or 16, to which both pointers are aligned) to shared memory: the first source_bytes of
// them from `from`, zeros after. 16 bytes go around the L1 cache. They are there for the caller after a wait, for others
// after a barrier that follows it.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* to, const void* from, int source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(source_bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(shared_address(to)), "l"(from), "n"(kBytes), "r"(source_bytes) : "memory");
}
// Closes the group of the copies started since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the kPending newest groups are on their way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory");
}
// Waits for all copies, of open and closed groups.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2^x by the special function unit: 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

using emulator::cp_async;
using emulator::cp_async_commit;
using emulator::cp_async_wait;
using emulator::cp_async_wait_all;
using emulator::ldmatrix_x1;
using emulator::ldmatrix_x1_trans;
using emulator::ldmatrix_x2;
using emulator::ldmatrix_x2_trans;
using emulator::ldmatrix_x4;
using emulator::ldmatrix_x4_trans;
using emulator::mma_m16n8k16;

inline float exp2_approx(float x) { return exp2f(x); }

#endif

// Two values of type T, rounded to nearest, in one register: `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (__is_same(T, __half)) {
    const __half2 v = __floats2half2_rn(low, high);
    memcpy(&bits, &v, 4);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &v, 4);
  }
  return bits;
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (__is_same(T, __half)) {
    __half2 v;
    memcpy(&v, &bits, 4);
    return __half22float2(v);
  } else {
    __nv_bfloat162 v;
    memcpy(&v, &bits, 4);
    return __bfloat1622float2(v);
  }
}

}  // namespace ppnet::cuda
