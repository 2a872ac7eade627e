// Atomic operations, before which other threads may go on, and loads and stores with a cache hint.
#pragma once

#include "block.h"
#include "half.h"

namespace ppnet::emulator {

// The value of a parameter that does not take part in finding T.
template <class T>
struct As {
  using type = T;
};
template <class T>
using as_t = typename As<T>::type;

template <class T, class F>
T exchange(T* p, F next) {
  may_switch();
  const T old = *p;
  *p = next(old);
  return old;
}

}  // namespace ppnet::emulator

#define PPNET_ATOMIC(name, next)                                                    \
  template <class T>                                                                \
  T name(T* p, ppnet::emulator::as_t<T> x) {                                        \
    return ppnet::emulator::exchange(p, [=](T old) { return static_cast<T>(next); }); \
  }
PPNET_ATOMIC(atomicAdd, old + x)
PPNET_ATOMIC(atomicSub, old - x)
PPNET_ATOMIC(atomicExch, ((void)old, x))
PPNET_ATOMIC(atomicMin, x < old ? x : old)
PPNET_ATOMIC(atomicMax, x > old ? x : old)
PPNET_ATOMIC(atomicAnd, old & x)
PPNET_ATOMIC(atomicOr, old | x)
PPNET_ATOMIC(atomicXor, old ^ x)
PPNET_ATOMIC(atomicInc, old >= x ? 0 : old + 1)
PPNET_ATOMIC(atomicDec, old == 0 || old > x ? x : old - 1)
#undef PPNET_ATOMIC

template <class T>
T atomicCAS(T* p, ppnet::emulator::as_t<T> compare, ppnet::emulator::as_t<T> x) {
  return ppnet::emulator::exchange(p, [=](T old) { return old == compare ? x : old; });
}

#define PPNET_LOAD(name) \
  template <class T>     \
  T name(const T* p) {   \
    return *p;           \
  }
PPNET_LOAD(__ldg)
PPNET_LOAD(__ldca)
PPNET_LOAD(__ldcg)
PPNET_LOAD(__ldcs)
PPNET_LOAD(__ldcv)
PPNET_LOAD(__ldlu)
#undef PPNET_LOAD

#define PPNET_STORE(name)                           \
  template <class T>                                \
  void name(T* p, ppnet::emulator::as_t<T> x) {     \
    *p = x;                                         \
  }
PPNET_STORE(__stwb)
PPNET_STORE(__stcg)
PPNET_STORE(__stcs)
PPNET_STORE(__stwt)
#undef PPNET_STORE
