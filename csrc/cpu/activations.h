// Activations on a vector of floats or on a double: the value, or the value f and the derivative. kShort: precise enough
// for results that are rounded to 16 bits (vec_math.h).
// Included only by files of csrc/cpu, which are compiled once per instruction set: everything has internal linkage.
#pragma once

#include "act.h"
#include "vec_math.h"

namespace {

struct Silu {
  template <bool kShort, class V>
  static V value(V x) {
    return x / (constant<V>(1) + e_to<kShort>(-x));
  }
  template <bool kShort, class V>
  static void both(V x, V& f, V& slope) {
    const V s = logistic<kShort>(x);
    f = x * s;
    slope = fma(f, constant<V>(1) - s, s);
  }
};

struct Gelu {
  template <bool kShort, class V>
  static V value(V x) {
    V bell;
    return x * normal_cdf<kShort>(x, bell);
  }
  template <bool kShort, class V>
  static void both(V x, V& f, V& slope) {
    V bell;
    const V p = normal_cdf<kShort>(x, bell);
    f = x * p;
    slope = fma(x * bell, constant<V>(0.39894228040143267794), p);
  }
};

// 1/2 (1 + tanh y) = logistic(2 y), which keeps its relative precision where tanh y is near -1.
struct GeluTanh {
  static constexpr double kLinear = 1.5957691216057307117, kCubic = 0.044715;  // 2 sqrt(2 / pi)
  template <class V>
  static V twice_y(V x) {
    return constant<V>(kLinear) * fma(constant<V>(kCubic) * x * x, x, x);
  }
  template <bool kShort, class V>
  static V value(V x) {
    return x / (constant<V>(1) + e_to<kShort>(-twice_y(x)));
  }
  template <bool kShort, class V>
  static void both(V x, V& f, V& slope) {
    const V one = constant<V>(1), zero = constant<V>(0), t = twice_y(x);
    // s and 1 - s from e^-|t|: the slope of y is so large that 1 - s must not cancel.
    const V e = e_to<kShort>(-max(t, -t)), large = one / (one + e), small = e * large;
    const V s = if_less(t, zero, small, large), rest = if_less(t, zero, large, small);
    f = x * s;
    const V slope_of_y = constant<V>(kLinear) * fma(constant<V>(3 * kCubic) * x, x, one);
    slope = fma(f * rest, slope_of_y, s);
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
