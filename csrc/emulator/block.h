// The threads of one block. The blocks of a launch run one after the other, the threads of a block one at a time: each
// until it waits for others, at a barrier or in an operation of its warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "fiber.h"
#include "types.h"

namespace ppnet::emulator {

constexpr int kMaxThreads = 1024;

// A line of a kernel, for messages.
struct Where {
  const char* file = nullptr;
  int line = 0;
  const char* function = nullptr;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                              const char* function = __builtin_FUNCTION()) {
    return {file, line, function};
  }
};

// A cp.async on its way.
struct Copy {
  void* to;
  const void* from;
  int bytes, source_bytes;  // the rest is filled with zeros
};

enum class State : uint8_t { ready, at_barrier, in_warp, returned };

struct Thread {
  Context context;
  uint3 index;
  int warp, lane;
  State state;
  Where where;                // of what it waits in, if it waits
  const char* what;           // "__syncthreads", if it waits
  uint32_t calls;             // of may_switch
  std::vector<Copy> copies;   // oldest first; those of closed groups before the open one's
  std::vector<size_t> groups;  // how many copies each closed group has, oldest first
};

// What the lanes of a warp brought to an operation that they execute together, for the last of them to carry out.
struct Posted {
  const void* in[32];
  void* out[32];
};
using Operation = void (*)(const Posted& posted, uint32_t lanes);

struct Warp {
  uint32_t exists, ready, waiting, returned;  // sets of lanes
  uint32_t mask[32];                          // that a waiting lane called with
  Operation operation[32];
  Posted posted;
};

struct Block {
  dim3 grid, shape;
  uint3 index;
  int threads, warps, returned;
  int arrived, sum;  // at the barrier: threads, and the sum of their values
  int met_sum;       // of the last barrier that all have reached
  uint8_t* shared;           // dynamic
  size_t shared_bytes;
  Thread thread[kMaxThreads];
  Warp warp[kMaxThreads / 32];
};

extern Block block;
extern Thread* current;  // null on the host's side

// Ends the launch with an error at `thread`. The format is printf's.
[[noreturn]] void fail(const Thread& thread, Where where, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// Waits for all threads of the block; returns the sum of their values.
int barrier(int value, const char* what, Where where);

// Waits for the lanes of `mask`; the last one there calls `operation`, which must read posted.in and write posted.out.
void together(Operation operation, uint32_t mask, const void* in, void* out, const char* what, Where where);

// Other threads may go on here: in an order of a seed, or when a thread calls this over and over, as in polling.
void may_switch();

// A number of the seed's; 0 without one.
uint32_t random_bits();

bool in_shared(const void* p, size_t bytes);

// Runs call(arguments) in every thread of every block. Returns 0, or the number of an error that message() describes.
struct Launch {
  void (*call)(const void* arguments);
  const void* arguments;
  const void* kernel;  // its address, for the name
  dim3 grid, shape;
  size_t shared_bytes;
};
int run(const Launch& launch);
const char* message();

// 0: threads take turns. Otherwise warps, lanes, blocks and copies go in an order of that seed's, some far ahead.
void set_seed(uint64_t seed);
uint64_t seed();

}  // namespace ppnet::emulator
