// Functions behind the activations, on a vector of floats (vec.h) or on one double; the same names for both.
// Included only by files of csrc/cpu, which are compiled once per instruction set: everything has internal linkage.
#pragma once

#include "vec.h"

namespace {

// The double as a vector of one lane. Its functions are the compiler's, so that no other header is needed.
inline double load(const double* p) { return *p; }
inline double load(const double* p, int64_t n) { return n ? *p : 0.0; }
inline void store(double* p, double x) { *p = x; }
inline void store(double* p, double x, int64_t n) {
  if (n) *p = x;
}
inline double fma(double a, double b, double c) { return a * b + c; }
inline double max(double a, double b) { return a > b ? a : b; }  // keeps NaN in b, as max of vectors does
inline double if_less(double a, double b, double x, double y) { return a < b ? x : y; }

// The vector that T is computed in, and its number of elements.
template <class T>
struct Vector {
  using type = vfloat;
  static constexpr int64_t lanes = kLanes;
};
template <>
struct Vector<double> {
  using type = double;
  static constexpr int64_t lanes = 1;
};

template <class V>
inline V constant(double x);
template <>
inline vfloat constant<vfloat>(double x) {
  return splat(static_cast<float>(x));
}
template <>
inline double constant<double>(double x) {
  return x;
}

// Stores whose rounding to bf16 is the processor's where it has it: one instruction for eight, but numbers below 2^-126
// become 0. Otherwise those of vec.h.
template <class T, class V>
inline void put(T* p, V x) {
  store(p, x);
}
template <class T, class V>
inline void put(T* p, V x, int64_t n) {
  store(p, x, n);
}
#if defined(__AVX512BF16__)
inline __m256i round_bf16(vfloat x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
inline void put(bf16_t* p, vfloat x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(x)); }
inline void put(bf16_t* p, vfloat x, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), round_bf16(x)); }
#elif defined(__AVX512F__)
inline __m256i round_bf16(vfloat x) { return narrow_bf16(x); }
#endif

// Stores a cache line around the cache: the vectors of consecutive elements that fill it. `p` is aligned to it.
template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
template <class T, class V>
inline void stream_line(T* p, const V* x) {
  for (int64_t i = 0; i < kLine<T>; i += Vector<T>::lanes, ++x) put(p + i, *x);
}
#if defined(__AVX512F__)
inline void stream_line(float* p, const vfloat* x) { _mm512_stream_ps(p, x[0]); }
inline void stream_halves(void* p, __m256i low, __m256i high) {
  _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}
inline void stream_line(bf16_t* p, const vfloat* x) { stream_halves(p, round_bf16(x[0]), round_bf16(x[1])); }
inline void stream_line(f16_t* p, const vfloat* x) { stream_halves(p, narrow_f16(x[0]), narrow_f16(x[1])); }
#elif defined(__x86_64__)
inline void stream_line(float* p, const vfloat* x) {
  for (int64_t i = 0; i < kLine<float>; i += kLanes, ++x)
#if defined(__AVX2__)
    _mm256_stream_ps(p + i, *x);
#else
    _mm_stream_ps(p + i, *x);
#endif
}
inline void stream_line(bf16_t* p, const vfloat* x) {
  alignas(64) bf16_t line[kLine<bf16_t>];
  for (int64_t i = 0; i < kLine<bf16_t>; i += kLanes, ++x) store(line + i, *x);
  for (int64_t i = 0; i < 4; ++i)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, reinterpret_cast<const __m128i*>(line)[i]);
}
inline void stream_line(f16_t* p, const vfloat* x) {
  alignas(64) f16_t line[kLine<f16_t>];
  for (int64_t i = 0; i < kLine<f16_t>; i += kLanes, ++x) store(line + i, *x);
  for (int64_t i = 0; i < 4; ++i)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, reinterpret_cast<const __m128i*>(line)[i]);
}
#endif

// Streamed lines become visible to the thread that reads them only after a fence.
inline void finish_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// kShort: for results that are rounded to 16 bits, relative error 1e-5 instead of 1e-7. Fewer operations: on these the
// processors compute no faster than memory delivers.
template <bool kShort>
inline double e_to(double x) {
  return __builtin_exp(x);
}

// e^x as exp of vec.h has it (error about one unit in the last place, gradual underflow, NaN kept), with a shorter chain of
// dependent operations: where nothing else is computed it is what an activation waits for. e^r - 1 - r was fitted by a
// polynomial of degree 6 (4: kShort) on |r| <= ln(2) / 2, relative error 3e-9 (5e-6).
template <bool kShort>
inline vfloat e_to(vfloat x) {
  x = max(splat(-104.0f), min(splat(89.0f), x));
  const vfloat n = round_even(x * splat(1.44269504088896341f));
  const vfloat one = splat(1.0f);
  vfloat p;
  if (kShort) {
    const vfloat r = fma(n, splat(-0.693147181f), x);
    p = fma(fma(splat(0.0412773657f), r, splat(0.167536008f)), r, splat(0.500051262f));
    p = fma(fma(p, r, one), r, one);
  } else {
    vfloat r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    const vfloat high = fma(splat(0.00138145396f), r, splat(0.00836874516f));
    const vfloat low = fma(splat(0.0416683908f), r, splat(0.166665204f));
    p = fma(fma(fma(fma(high, r * r, low), r, splat(0.499999934f)), r, one), r, one);
  }
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const vint whole = to_int(n), part = half_of(whole);
  return p * power_of_two(part) * power_of_two(minus(whole, part));
#endif
}

// 1 / (1 + e^-x).
template <bool kShort, class V>
inline V logistic(V x) {
  const V one = constant<V>(1);
  return one / (one + e_to<kShort>(-x));
}

// Standard normal distribution function of x; `bell` is e^(-x^2 / 2).
template <bool kShort>
inline double normal_cdf(double x, double& bell) {
  bell = e_to<kShort>(-0.5 * x * x);
  return 0.5 * __builtin_erfc(-0.70710678118654752440 * x);
}

// The same in floats. Around 0 it is 1/2 + x R(x^2), elsewhere e^(-x^2/2) t Q(t), t = 1 / (1 + 0.265 |x|), for -|x|, so that
// both tails keep their relative precision. R and Q were fitted to scipy's ndtr and erfcx: relative errors 5e-10, 1.4e-8.
// kShort has the latter alone, with t = 1 / (1 + 0.46 |x|) and a shorter Q: 9e-6.
template <bool kShort>
inline vfloat normal_cdf(vfloat x, vfloat& bell) {
  const vfloat one = splat(1.0f), square = x * x;
  bell = e_to<kShort>(splat(-0.5f) * square);
  const vfloat size = max(x, -x);
  if (kShort) {
    const vfloat t = one / fma(splat(0.46f), size, one);
    vfloat q = splat(0.0722283677f);
    const float lower[] = {-0.236545587f, 0.177802185f, 0.116106161f, 0.18706683f, 0.183346329f};
    for (float c : lower) q = fma(q, t, splat(c));
    q = q * t * bell;
    return if_less(x, splat(0.0f), q, one - q);
  }
  const vfloat t = one / fma(splat(0.265f), size, one);
  vfloat q = splat(0.0306245191f);
  const float lower_q[] = {-0.143300848f, 0.215950778f, -0.114286844f, 0.136555179f,
                           0.060894929f,  0.10255511f,  0.105266776f,  0.105740398f};
  for (float c : lower_q) q = fma(q, t, splat(c));
  const vfloat tail = q * t * bell;
  vfloat r = splat(-7.66260872e-06f);
  const float lower_r[] = {0.00011350748f, -0.00118634853f, 0.00997333011f, -0.0664903608f, 0.39894228f};
  for (float c : lower_r) r = fma(r, square, splat(c));
  const vfloat outer = if_less(x, splat(0.0f), tail, one - tail);
  return if_less(size, one, fma(r, x, splat(0.5f)), outer);
}

}  // namespace
