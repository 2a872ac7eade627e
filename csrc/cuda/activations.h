// Activations of floats, or of doubles: the value, or the value f and the derivative. kShort: the result, or what it is
// summed from, is rounded to 16 bits, for which the special functions of the hardware are precise enough.
#pragma once

#include "cpu/act.h"
#include "launch.h"

namespace ppnet::cuda {

template <bool kShort>
__device__ __forceinline__ float e_to(float x) {
  if constexpr (kShort) return __expf(x);
  else return expf(x);
}
template <bool kShort>
__device__ __forceinline__ double e_to(double x) {
  return exp(x);
}
template <bool kShort>
__device__ __forceinline__ float quotient(float a, float b) {
  if constexpr (kShort) return __fdividef(a, b);
  else return a / b;
}
template <bool kShort>
__device__ __forceinline__ double quotient(double a, double b) {
  return a / b;
}
// 1 - the error function; 1 + the error function cancels in the lower tail.
__device__ __forceinline__ float error_complement(float x) { return erfcf(x); }
__device__ __forceinline__ double error_complement(double x) { return erfc(x); }

struct Silu {
  template <bool kShort, class C>
  __device__ static C value(C x) {
    return quotient<kShort>(x, 1 + e_to<kShort>(-x));
  }
  template <bool kShort, class C>
  __device__ static void both(C x, C& f, C& slope) {
    const C s = quotient<kShort>(C(1), 1 + e_to<kShort>(-x));
    f = x * s;
    slope = f * (1 - s) + s;
  }
};

struct Gelu {
  // The normal distribution's share below x, and bell = e^(-x²/2).
  template <bool kShort, class C>
  __device__ static C share(C x, C bell) {
    if constexpr (!kShort) {
      return C(0.5) * error_complement(-x * C(0.70710678118654752440));
    } else {
      // 1/2 erfc(z) e^(z²), z = |x| / √2, as a polynomial without constant in t = 1 / (1 + 0.44 z): fitted to the least
      // relative error over 0 <= z <= 9.5, which is 5e-6, less than a fortieth of a rounding to fp16.
      const C t = __fdividef(1.0f, 1.0f + 0.31112698372208092f * fabsf(x));
      C tail = -0.07305285528223672f;
      tail = tail * t + 0.17532740607100247f;
      tail = tail * t + 0.020363072526462f;
      tail = tail * t + 0.13179507040518457f;
      tail = tail * t + 0.12128416605065712f;
      tail = tail * t + 0.12428057721314639f;
      tail = tail * t * bell;
      return x < 0 ? tail : 1 - tail;
    }
  }
  template <bool kShort, class C>
  __device__ static C value(C x) {
    return x * share<kShort>(x, kShort ? e_to<kShort>(C(-0.5) * x * x) : C(0));
  }
  template <bool kShort, class C>
  __device__ static void both(C x, C& f, C& slope) {
    const C bell = e_to<kShort>(C(-0.5) * x * x), p = share<kShort>(x, bell);
    f = x * p;
    slope = x * bell * C(0.39894228040143267794) + p;
  }
};

// 1/2 (1 + tanh y) = 1 / (1 + e^-2y), which keeps its relative precision where tanh y is near -1.
struct GeluTanh {
  static constexpr double kLinear = 1.5957691216057307117, kCubic = 0.044715;  // 2 sqrt(2 / pi)
  template <bool kShort, class C>
  __device__ static C value(C x) {
    const C t = x * (C(kLinear * kCubic) * x * x + C(kLinear));
    return quotient<kShort>(x, 1 + e_to<kShort>(-t));
  }
  template <bool kShort, class C>
  __device__ static void both(C x, C& f, C& slope) {
    const C t = x * (C(kLinear * kCubic) * x * x + C(kLinear));
    // s and 1 - s from e^-|t|: the slope of y is so large that 1 - s must not cancel.
    const C e = e_to<kShort>(t < 0 ? t : -t), large = quotient<kShort>(C(1), 1 + e), small = e * large;
    const C s = t < 0 ? small : large, rest = t < 0 ? large : small;
    f = x * s;
    slope = f * rest * (C(3 * kLinear * kCubic) * x * x + C(kLinear)) + s;
  }
};

struct Relu {
  template <bool kShort, class C>
  __device__ static C value(C x) {
    return x <= 0 ? C(0) : x;  // NaN stays
  }
  template <bool kShort, class C>
  __device__ static void both(C x, C& f, C& slope) {
    f = value<kShort>(x);
    slope = x > 0 ? C(1) : f;  // f is 0, or the NaN in x
  }
};

struct Relu2 {
  template <bool kShort, class C>
  __device__ static C value(C x) {
    const C f = Relu::value<kShort>(x);
    return f * f;
  }
  template <bool kShort, class C>
  __device__ static void both(C x, C& f, C& slope) {
    const C positive = Relu::value<kShort>(x);
    f = positive * positive;
    slope = positive + positive;
  }
};

// body(A()) with the activation of that name: one branch for as many elements as the body takes.
template <class Body>
__device__ __forceinline__ void with_act(Act act, const Body& body) {
  switch (act) {
    case Act::silu: return body(Silu());
    case Act::gelu: return body(Gelu());
    case Act::gelu_tanh: return body(GeluTanh());
    case Act::relu: return body(Relu());
    case Act::relu2: break;
  }
  body(Relu2());
}

template <bool kShort>
__device__ __forceinline__ float activate(Act act, float x) {
  float y;
  with_act(act, [&](auto a) { y = decltype(a)::template value<kShort>(x); });
  return y;
}

}  // namespace ppnet::cuda
