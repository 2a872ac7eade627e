// Activations on a vector of floats or on a double: the value, or the value f and the derivative. kShort: precise
// enough for results that are rounded to bf16 (vec_math.h).
// Included only by files of csrc/cpu, which are compiled once per instruction set: everything has internal linkage.
#pragma once

#include "act.h"
#include "activations_gelu.h"
#include "vec_math.h"

namespace {

struct Silu {
  template <bool kShort, class V>
  static V value(V x) {
    return share_of<kShort>(x, e_to<kShort>(x, -1));
  }
  template <bool kShort, class V>
  static void both(V x, V& f, V& slope) {
    const V one = constant<V>(1), s = share_of<kShort>(one, e_to<kShort>(x, -1));
    f = x * s;
    slope = fma(f, one - s, s);
  }
};

struct Gelu {
  template <bool kShort, class V>
  static V value(V x) {
    if constexpr (kShort) {
#if defined(__AVX512F__)
      return gelu_value(x, gelu_piece(x));
#else
      return share_of<true>(x, short_normal_odds(x, short_normal_size(x)));
#endif
    } else {
      V bell;
      return x * normal_cdf(x, bell);
    }
  }
  template <bool kShort, class V>
  static void both(V x, V& f, V& slope) {
    if constexpr (kShort) {
#if defined(__AVX512F__)
      const GeluPiece at = gelu_piece(x);
      f = gelu_value(x, at);
      slope = gelu_slope(x, at);
#else
      const V one = constant<V>(1), size = short_normal_size(x);
      const V p = share_of<true>(one, short_normal_odds(x, size));
      f = x * p;
      slope = fma(f * (one - p), short_normal_slope(size), p);
#endif
    } else {
      V bell;
      const V p = normal_cdf(x, bell);
      f = x * p;
      slope = fma(x * bell, constant<V>(0.39894228040143267794), p);
    }
  }
};

// 1/2 (1 + tanh y) = 1 / (1 + e^-2y), which keeps its relative precision where tanh y is near -1.
struct GeluTanh {
  static constexpr double kLinear = 1.5957691216057307117, kCubic = 0.044715;  // 2 sqrt(2 / pi)
  // Of 2y.
  template <class V>
  static V slope_of_y(V x, double cubic) {
    return fma(x * x, constant<V>(kLinear * cubic), constant<V>(kLinear));
  }
  template <bool kShort, class V>
  static V value(V x) {
    return share_of<kShort>(x, e_to<kShort>(x * slope_of_y(x, kCubic), -1));
  }
  template <bool kShort, class V>
  static void both(V x, V& f, V& slope) {
    const V one = constant<V>(1), zero = constant<V>(0), t = x * slope_of_y(x, kCubic);
    // s and 1 - s from e^-|t|: the slope of y is so large that 1 - s must not cancel.
    const V e = e_to<kShort>(absolute(t), -1), large = share_of<kShort>(one, e), small = e * large;
    const V s = if_less(t, zero, small, large), rest = if_less(t, zero, large, small);
    f = x * s;
    slope = fma(f * rest, slope_of_y(x, 3 * kCubic), s);
  }
};

struct Relu {
  template <bool kShort, class V>
  static V value(V x) {
    return max(constant<V>(0), x);
  }
  template <bool kShort, class V>
  static void both(V x, V& f, V& slope) {
    const V zero = constant<V>(0);
    f = max(zero, x);
    slope = if_less(zero, x, constant<V>(1), f);  // f is 0, or the NaN in x
  }
};

struct Relu2 {
  template <bool kShort, class V>
  static V value(V x) {
    const V f = max(constant<V>(0), x);
    return f * f;
  }
  template <bool kShort, class V>
  static void both(V x, V& f, V& slope) {
    const V positive = max(constant<V>(0), x);
    f = positive * positive;
    slope = positive + positive;
  }
};

}  // namespace
