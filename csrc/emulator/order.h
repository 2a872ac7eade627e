// In what order the threads of a block go on under a seed.
#pragma once

#include <cstdint>

namespace ppnet::emulator {

inline int lowest(uint32_t lanes) { return __builtin_ctz(lanes); }

// The order of a seed: always the first ready warp of `warps`, and of its lanes the first ready one, counting up or down
// from `first_lane`. Drawn anew now and then, so that each warp is at times far ahead of the others.
struct Order {
  uint64_t state = 0;
  int warps[32];
  int first_lane = 0;
  bool descending = false;

  uint32_t bits() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }
  void draw(int count) {
    for (int w = 0; w < count; ++w) {
      const int other = static_cast<int>(bits() % static_cast<uint32_t>(w + 1));
      warps[w] = warps[other];
      warps[other] = w;
    }
    first_lane = static_cast<int>(bits() % 32);
    descending = bits() % 2;
  }
  // The lane of `ready` that comes first.
  int first(uint32_t ready) const {
    const uint32_t turned = ready >> first_lane | (first_lane ? ready << (32 - first_lane) : 0);
    return (first_lane + (descending ? 31 - __builtin_clz(turned) : lowest(turned))) % 32;
  }
};

}  // namespace ppnet::emulator
