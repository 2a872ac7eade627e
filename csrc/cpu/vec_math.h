// Functions behind the activations, on a vector of floats (vec.h) or on one double; the same names for both.
// Included only by files of csrc/cpu, which are compiled once per instruction set: everything has internal linkage.
#pragma once

#include "vec.h"

namespace {

// The double as a vector of one lane. Its functions are the compiler's, so that no other header is needed.
inline double load(const double* p) { return *p; }
inline double load(const double* p, int64_t n) { return n ? *p : 0.0; }
inline void load_line(const double* p, double* x) { memcpy(x, p, 64); }
inline void store(double* p, double x) { *p = x; }
inline void store(double* p, double x, int64_t n) {
  if (n) *p = x;
}
inline double fma(double a, double b, double c) { return a * b + c; }
inline double max(double a, double b) { return a > b ? a : b; }  // keeps NaN in b, as max of vectors does
inline double absolute(double a) { return __builtin_fabs(a); }
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
#if defined(__AVX512BF16__)
inline void stream_line(bf16_t* p, const vfloat* x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[1], x[0])));
}
#else
inline void stream_line(bf16_t* p, const vfloat* x) { stream_halves(p, round_bf16(x[0]), round_bf16(x[1])); }
#endif
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

// c[0] x^n + c[1] x^(n - 1) ... + c[n], in Horner's order: it has the fewest operations, and schemes with
// shorter chains of dependent ones were slower.
template <int kCount>
inline vfloat polynomial(vfloat x, const float (&c)[kCount]) {
  vfloat p = splat(c[0]);
  for (int i = 1; i < kCount; ++i) p = fma(p, x, splat(c[i]));
  return p;
}

// kShort: for results that are rounded to bf16, whose rounding has a relative error of 4e-3: 2e-4 instead of 1e-7, and
// half the operations. On the others a processor computes no faster than memory delivers.
template <class T>
constexpr bool kRoundsShort = false;
template <>
constexpr bool kRoundsShort<bf16_t> = true;

// 2^t, relative error 7.5e-5: 2^r was fitted by a cubic on |r| <= 1/2.
inline vfloat short_two_to(vfloat t) {
#if !defined(__AVX512F__)
  t = max(splat(-150.0f), min(splat(129.0f), t));
#endif
  const vfloat n = round_even(t);
  return times_power_of_two(polynomial(t - n, {0.0551715323f, 0.242612068f, 0.693261077f, 0.999928017f}), n);
}

// e^(scale x). Where x is infinite it is 0 or infinity, and a NaN is kept.
template <bool kShort>
inline double e_to(double x, double scale = 1) {
  return __builtin_exp(scale * x);
}
template <bool kShort>
inline vfloat e_to(vfloat x, double scale = 1) {
  constexpr double kLog2e = 1.44269504088896340736;
  if constexpr (kShort) return short_two_to(x * splat(static_cast<float>(scale * kLog2e)));
  return exp(x * splat(static_cast<float>(scale)));
}

// x / (1 + odds): for the odds against p, x p. kShort: where the processor has it, by its approximate reciprocal, whose
// relative error is 6e-5: a division occupies it longer than anything else here.
template <bool kShort, class V>
inline V share_of(V x, V odds) {
#if defined(__AVX512F__)
  if constexpr (kShort && sizeof(V) == sizeof(vfloat)) return x * _mm512_rcp14_ps(constant<V>(1) + odds);
#endif
  return x / (constant<V>(1) + odds);
}

// Of p = the standard normal distribution function of x: the odds against it, (1 - p) / p, and p' / (p (1 - p)), the
// slope of the logarithm of the odds for it. That logarithm was fitted by x R(|x|) up to 6: the error of p is 2e-4 p,
// or 2e-9 (torch's own is 1e-7). Its slope was fitted apart: the error of x p' is 3e-4 min(p, 1 - p), or 3e-9.
inline vfloat short_normal_odds(vfloat x, vfloat size) {
  const float r[] = {-0.000319036938f, 0.00394071318f, -0.00815862366f, -0.100046393f, 0.00203641438f, -2.30399006f};
  return short_two_to(x * polynomial(size, r));
}
inline vfloat short_normal_slope(vfloat size) {
  const float r[] = {-0.000373719985f, 0.00663868622f, -0.0428139901f, 0.100155278f,
                     0.105856628f,     0.0573364323f, 1.58577609f};
  return polynomial(size, r);
}
// What both take as |x|.
inline vfloat short_normal_size(vfloat x) { return min(splat(6.0f), absolute(x)); }

// Standard normal distribution function of x; `bell` is e^(-x^2 / 2).
inline double normal_cdf(double x, double& bell) {
  bell = __builtin_exp(-0.5 * x * x);
  return 0.5 * __builtin_erfc(-0.70710678118654752440 * x);
}

// The same in floats. Around 0 it is 1/2 + x R(x^2), elsewhere e^(-x^2/2) t Q(t), t = 1 / (1 + 0.265 |x|), for -|x|, so
// that both tails keep their relative precision. R and Q were fitted to scipy's ndtr and erfcx: relative errors 5e-10,
// 1.4e-8.
inline vfloat normal_cdf(vfloat x, vfloat& bell) {
  const vfloat one = splat(1.0f), square = x * x;
  bell = exp(splat(-0.5f) * square);
  const vfloat size = absolute(x);
  const vfloat t = one / fma(splat(0.265f), size, one);
  const float q[] = {0.0306245191f, -0.143300848f, 0.215950778f, -0.114286844f, 0.136555179f,
                     0.060894929f,  0.10255511f,   0.105266776f, 0.105740398f};
  const float r[] = {-7.66260872e-06f, 0.00011350748f, -0.00118634853f, 0.00997333011f, -0.0664903608f, 0.39894228f};
  const vfloat tail = polynomial(t, q) * (t * bell);
  const vfloat outer = if_less(x, splat(0.0f), tail, one - tail);
  return if_less(size, one, fma(polynomial(square, r), x, splat(0.5f)), outer);
}

}  // namespace
