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
inline double exp(double x) { return __builtin_exp(x); }

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

// A store around the cache; `p` is aligned to the bytes of the vector in elements of T. Where there is none it is ordinary.
template <class T, class V>
inline void stream(T* p, V x) {
  store(p, x);
}
#if defined(__AVX512F__)
inline void stream(float* p, vfloat x) { _mm512_stream_ps(p, x); }
inline void stream(bf16_t* p, vfloat x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }
inline void stream(f16_t* p, vfloat x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_f16(x)); }
#elif defined(__AVX2__)
inline void stream(float* p, vfloat x) { _mm256_stream_ps(p, x); }
#elif defined(__SSE2__)
inline void stream(float* p, vfloat x) { _mm_stream_ps(p, x); }
#endif

// Streamed lines become visible to the thread that reads them only after a fence.
inline void finish_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// 1 / (1 + e^-x).
template <class V>
inline V logistic(V x) {
  const V one = constant<V>(1);
  return one / (one + exp(-x));
}

// Standard normal distribution function of x; `bell` is e^(-x^2 / 2).
inline double normal_cdf(double x, double& bell) {
  bell = exp(-0.5 * x * x);
  return 0.5 * __builtin_erfc(-0.70710678118654752440 * x);
}

// The same in floats. Around 0 it is 1/2 + x R(x^2), elsewhere e^(-x^2/2) t Q(t), t = 1 / (1 + 0.265 |x|), for -|x|, so that
// both tails keep their relative precision. R and Q were fitted to scipy's ndtr and erfcx: relative errors 5e-10, 1.4e-8.
inline vfloat normal_cdf(vfloat x, vfloat& bell) {
  const vfloat one = splat(1.0f), square = x * x;
  bell = exp(splat(-0.5f) * square);
  const vfloat size = max(x, -x);
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
