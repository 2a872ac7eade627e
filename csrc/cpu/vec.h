// One vector of floats as wide as the instruction set allows, loaded from and stored to float, bf16 and f16.
// Included only by files of csrc/cpu, which are compiled once per instruction set: everything has internal linkage.
//
// vfloat is a vector type of GCC and Clang: + - * / work on it directly. Loads and stores need no alignment; those with
// a count touch only the first n elements (0 <= n <= kLanes), and a partial load fills the other lanes with 0.
#pragma once

#include "convert.h"

// Loops over rows, tokens and the vectors of a line must be unrolled whole, or what they hold lives in memory in place
// of registers.
#define PPNET_UNROLL _Pragma("GCC unroll 32")

namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using vfloat = __m512;
using vint = __m512i;

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline vfloat splat(float x) { return _mm512_set1_ps(x); }
inline vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
// NaN in `b` is kept: the instruction returns its second operand when either is NaN.
inline vfloat max(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
inline vfloat min(vfloat a, vfloat b) { return _mm512_min_ps(a, b); }
inline vfloat round_even(vfloat a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vfloat sqrt(vfloat a) { return _mm512_sqrt_ps(a); }
inline vfloat absolute(vfloat a) { return _mm512_abs_ps(a); }
inline vint to_int(vfloat a) { return _mm512_cvtps_epi32(a); }
inline vfloat power_of_two(vint n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}
inline vint half_of(vint n) { return _mm512_srai_epi32(n, 1); }
inline vint minus(vint a, vint b) { return _mm512_sub_epi32(a, b); }
// Lane by lane: a < b ? x : y.
inline vfloat if_less(vfloat a, vfloat b, vfloat x, vfloat y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
inline float sum(vfloat a) { return _mm512_reduce_add_ps(a); }
inline float largest(vfloat a) { return _mm512_reduce_max_ps(a); }

inline vfloat load(const float* p) { return _mm512_loadu_ps(p); }
inline vfloat load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store(float* p, vfloat x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, vfloat x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

inline vfloat widen_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m256i narrow_bf16(vfloat x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0)));
}
inline vfloat load(const bf16_t* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline vfloat load(const bf16_t* p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
// A line of 32: one instruction for each vector puts every element into the upper half of its lane.
inline void load_line(const bf16_t* p, vfloat* x) {
  const __m512i line = _mm512_loadu_si512(p);
  const __m512i first = _mm512_set_epi32(0xf000f, 0xe000e, 0xd000d, 0xc000c, 0xb000b, 0xa000a, 0x90009, 0x80008,
                                         0x70007, 0x60006, 0x50005, 0x40004, 0x30003, 0x20002, 0x10001, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  x[0] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, first, line));
  x[1] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, second, line));
}
inline void store(bf16_t* p, vfloat x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }
inline void store(bf16_t* p, vfloat x, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(x)); }

inline vfloat load(const f16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline vfloat load(const f16_t* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline __m256i narrow_f16(vfloat x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(f16_t* p, vfloat x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(x)); }
inline void store(f16_t* p, vfloat x, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_f16(x)); }

template <class T>
inline void load_line(const T* p, vfloat* x) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)); i += kLanes) *x++ = load(p + i);
}

#else

#if defined(__AVX2__)
constexpr int kLanes = 8;
using vfloat = __m256;
using vint = __m256i;

inline vfloat splat(float x) { return _mm256_set1_ps(x); }
inline vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
inline vfloat max(vfloat a, vfloat b) { return _mm256_max_ps(a, b); }
inline vfloat min(vfloat a, vfloat b) { return _mm256_min_ps(a, b); }
inline vfloat round_even(vfloat a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vfloat sqrt(vfloat a) { return _mm256_sqrt_ps(a); }
inline vfloat absolute(vfloat a) { return _mm256_andnot_ps(splat(-0.0f), a); }
inline vint to_int(vfloat a) { return _mm256_cvtps_epi32(a); }
inline vfloat power_of_two(vint n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline vint half_of(vint n) { return _mm256_srai_epi32(n, 1); }
inline vint minus(vint a, vint b) { return _mm256_sub_epi32(a, b); }
inline vfloat if_less(vfloat a, vfloat b, vfloat x, vfloat y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline vfloat load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vfloat x) { _mm256_storeu_ps(p, x); }
inline vfloat load(const bf16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store(bf16_t* p, vfloat x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i bits = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  // packus works within halves: lanes 0-3 and 4-7 end up in quarters 0 and 2.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline vfloat load(const f16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(f16_t* p, vfloat x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

constexpr int kLanes = 4;
typedef float vfloat __attribute__((vector_size(16)));
typedef int32_t vint __attribute__((vector_size(16)));

inline vfloat splat(float x) { return vfloat{x, x, x, x}; }
inline vfloat fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }
inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }
inline vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
inline vfloat absolute(vfloat a) { return reinterpret_cast<vfloat>(reinterpret_cast<vint>(a) & 0x7fffffff); }
// Adding and taking away 1.5 * 2^23 leaves the nearest integer; right for |a| < 2^22.
inline vfloat round_even(vfloat a) { return (a + splat(12582912.0f)) - splat(12582912.0f); }
inline vfloat sqrt(vfloat a) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
inline vint to_int(vfloat a) {
  vint out;
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<int32_t>(__builtin_rintf(a[i]));
  return out;
}
inline vfloat power_of_two(vint n) { return reinterpret_cast<vfloat>((n + 127) << 23); }
inline vint half_of(vint n) { return n >> 1; }
inline vint minus(vint a, vint b) { return a - b; }
inline vfloat if_less(vfloat a, vfloat b, vfloat x, vfloat y) { return a < b ? x : y; }

template <class T>
inline vfloat load(const T* p) {
  vfloat out;
  for (int i = 0; i < kLanes; ++i) out[i] = widen(p[i]);
  return out;
}
template <class T>
inline void store(T* p, vfloat x) {
  for (int i = 0; i < kLanes; ++i) narrow(x[i], p[i]);
}
inline vfloat load(const float* p) {
  vfloat out;
  memcpy(&out, p, sizeof out);
  return out;
}
inline void store(float* p, vfloat x) { memcpy(p, &x, sizeof x); }

#endif

template <class T>
inline void load_line(const T* p, vfloat* x) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)); i += kLanes) *x++ = load(p + i);
}
template <class T>
inline vfloat load(const T* p, int64_t n) {
  T whole[kLanes] = {};
  memcpy(whole, p, static_cast<size_t>(n) * sizeof(T));
  return load(whole);
}
template <class T>
inline void store(T* p, vfloat x, int64_t n) {
  T whole[kLanes];
  store(whole, x);
  memcpy(p, whole, static_cast<size_t>(n) * sizeof(T));
}
inline float sum(vfloat a) {
  float total = 0;
  for (int i = 0; i < kLanes / 2; ++i) total += a[i] + a[i + kLanes / 2];
  return total;
}
inline float largest(vfloat a) {
  float best = a[0];
  for (int i = 1; i < kLanes; ++i) best = a[i] > best ? a[i] : best;
  return best;
}

#endif

// p * 2^n for a whole n, gradually to 0 and to infinity; p is near 1.
#if defined(__AVX512F__)
// The instruction is made for this: a p of NaN, as an infinite n leaves it, is 0 or infinity as n says.
inline vfloat times_power_of_two(vfloat p, vfloat n) { return _mm512_scalef_ps(p, n); }
#else
// In two factors: each is a normal number even where the result overflows or is denormal.
inline vfloat times_power_of_two(vfloat p, vfloat n) {
  const vint whole = to_int(n), part = half_of(whole);
  return p * power_of_two(part) * power_of_two(minus(whole, part));
}
#endif

// e^x with an error of about one unit in the last place; overflows to infinity, underflows gradually to 0, keeps NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2; e^r - 1 - r was fitted by a polynomial of degree 6, relative error 3e-9, and is
// evaluated in a short chain of dependent operations: where nothing else is computed it is what the result waits for.
inline vfloat exp(vfloat x) {
  x = max(splat(-104.0f), min(splat(89.0f), x));
  const vfloat n = round_even(x * splat(1.44269504088896341f)), one = splat(1.0f);
  vfloat r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  const vfloat high = fma(splat(0.00138145396f), r, splat(0.00836874516f));
  const vfloat low = fma(splat(0.0416683908f), r, splat(0.166665204f));
  const vfloat p = fma(fma(fma(fma(high, r * r, low), r, splat(0.499999934f)), r, one), r, one);
  return times_power_of_two(p, n);
}

}  // namespace
