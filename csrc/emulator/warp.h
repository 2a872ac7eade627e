// Barriers, shuffles, votes and fences. A lane that another one reads must take part; all of a mask must agree.
#pragma once

#include "block.h"

namespace ppnet::emulator {

struct Shuffled {
  uint64_t value;
  int source;
};

template <class T>
void shuffle(const Posted& posted, uint32_t lanes) {
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const int source = static_cast<const Shuffled*>(posted.in[lane])->source;
    if (!(lanes >> source & 1)) {
      const Thread& t = block.thread[current->warp * 32 + lane];
      fail(t, current->where, "%s reads lane %d, which is not in the mask 0x%08x", current->what, source, lanes);
    }
    std::memcpy(posted.out[lane], &static_cast<const Shuffled*>(posted.in[source])->value, sizeof(T));
  }
}

template <class T>
T shuffled(uint32_t mask, const T& value, int source, const char* what, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2);
  Shuffled in{0, source};
  std::memcpy(&in.value, &value, sizeof(T));
  T out;
  together(shuffle<T>, mask, &in, &out, what, where);
  return out;
}

// The first lane of the group of `width` lanes that the caller is in.
inline int group(int width) { return current->lane & ~(width - 1); }

template <class T>
void reduce_add(const Posted& posted, uint32_t lanes) {
  T sum = 0;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) sum += *static_cast<const T*>(posted.in[__builtin_ctz(rest)]);
  for (uint32_t rest = lanes; rest; rest &= rest - 1) *static_cast<T*>(posted.out[__builtin_ctz(rest)]) = sum;
}

template <class T, bool kMax>
void reduce_extreme(const Posted& posted, uint32_t lanes) {
  T best = *static_cast<const T*>(posted.in[__builtin_ctz(lanes)]);
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const T x = *static_cast<const T*>(posted.in[__builtin_ctz(rest)]);
    best = kMax ? std::max(best, x) : std::min(best, x);
  }
  for (uint32_t rest = lanes; rest; rest &= rest - 1) *static_cast<T*>(posted.out[__builtin_ctz(rest)]) = best;
}

inline void vote(const Posted& posted, uint32_t lanes) {
  uint32_t yes = 0;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    yes |= uint32_t{*static_cast<const bool*>(posted.in[lane])} << lane;
  }
  for (uint32_t rest = lanes; rest; rest &= rest - 1) *static_cast<uint32_t*>(posted.out[__builtin_ctz(rest)]) = yes;
}

inline uint32_t voted(uint32_t mask, bool yes, const char* what, Where where) {
  uint32_t out;
  together(vote, mask, &yes, &out, what, where);
  return out;
}

inline void meet(const Posted&, uint32_t) {}

}  // namespace ppnet::emulator

#define PPNET_WHERE ::ppnet::emulator::Where where = ::ppnet::emulator::Where::here()

inline void __syncthreads(PPNET_WHERE) { ppnet::emulator::barrier(0, "__syncthreads", where); }
inline int __syncthreads_count(int yes, PPNET_WHERE) {
  return ppnet::emulator::barrier(yes != 0, "__syncthreads_count", where);
}
inline int __syncthreads_or(int yes, PPNET_WHERE) {
  return ppnet::emulator::barrier(yes != 0, "__syncthreads_or", where) != 0;
}
inline int __syncthreads_and(int yes, PPNET_WHERE) {
  return ppnet::emulator::barrier(yes == 0, "__syncthreads_and", where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, PPNET_WHERE) {
  ppnet::emulator::together(ppnet::emulator::meet, mask, nullptr, nullptr, "__syncwarp", where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, PPNET_WHERE) {
  const int lane = ppnet::emulator::group(width) + (source & (width - 1));
  return ppnet::emulator::shuffled(mask, value, lane, "__shfl_sync", where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, PPNET_WHERE) {
  const int lane = ppnet::emulator::current->lane, source = lane - static_cast<int>(delta);
  const int begin = ppnet::emulator::group(width);
  return ppnet::emulator::shuffled(mask, value, source >= begin ? source : lane, "__shfl_up_sync", where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PPNET_WHERE) {
  const int lane = ppnet::emulator::current->lane, source = lane + static_cast<int>(delta);
  const int end = ppnet::emulator::group(width) + width;
  return ppnet::emulator::shuffled(mask, value, source < end ? source : lane, "__shfl_down_sync", where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, PPNET_WHERE) {
  const int lane = ppnet::emulator::current->lane, source = lane ^ bits;
  const int end = ppnet::emulator::group(width) + width;
  return ppnet::emulator::shuffled(mask, value, source < end ? source : lane, "__shfl_xor_sync", where);
}

inline unsigned __ballot_sync(unsigned mask, int yes, PPNET_WHERE) {
  return ppnet::emulator::voted(mask, yes != 0, "__ballot_sync", where);
}
inline int __any_sync(unsigned mask, int yes, PPNET_WHERE) {
  return ppnet::emulator::voted(mask, yes != 0, "__any_sync", where) != 0;
}
inline int __all_sync(unsigned mask, int yes, PPNET_WHERE) {
  return ppnet::emulator::voted(mask, yes == 0, "__all_sync", where) == 0;
}
// All lanes that have not returned: those that have diverged are among them.
inline unsigned __activemask() {
  const ppnet::emulator::Warp& w = ppnet::emulator::block.warp[ppnet::emulator::current->warp];
  return w.exists & ~w.returned;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, PPNET_WHERE) {
  T out;
  ppnet::emulator::together(ppnet::emulator::reduce_add<T>, mask, &value, &out, "__reduce_add_sync", where);
  return out;
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, PPNET_WHERE) {
  T out;
  ppnet::emulator::together(ppnet::emulator::reduce_extreme<T, true>, mask, &value, &out, "__reduce_max_sync", where);
  return out;
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, PPNET_WHERE) {
  T out;
  ppnet::emulator::together(ppnet::emulator::reduce_extreme<T, false>, mask, &value, &out, "__reduce_min_sync", where);
  return out;
}

inline void __threadfence() { ppnet::emulator::may_switch(); }
inline void __threadfence_block() { ppnet::emulator::may_switch(); }
inline void __threadfence_system() { ppnet::emulator::may_switch(); }
inline void __nanosleep(unsigned) { ppnet::emulator::may_switch(); }
[[noreturn]] inline void __trap(PPNET_WHERE) {
  ppnet::emulator::fail(*ppnet::emulator::current, where, "__trap");
}
