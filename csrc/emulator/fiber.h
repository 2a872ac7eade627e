// Contexts that hand the processor to each other: one stack each, all on one thread of the operating system.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define PPNET_EMULATOR_UCONTEXT
#endif
#ifdef PPNET_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace ppnet::emulator {

struct Context {
#ifdef PPNET_EMULATOR_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
  // The bounds of its stack and what AddressSanitizer keeps of it; unused without it.
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
};

// Stacks of equal size, each above a page that may not be touched. They are kept from launch to launch.
class Stacks {
 public:
  ~Stacks();
  void reserve(int count);
  char* bottom(int i) const;
  void clean();  // after contexts that were left in the middle, whose frames AddressSanitizer still marks
  static constexpr size_t kBytes = 256 * 1024;  // reserved; only pages that are touched take memory

 private:
  char* memory_ = nullptr;
  int count_ = 0;
};

// Makes `context` call entry(), which must never return, when it is first switched to.
void prepare(Context& context, char* stack_bottom, void (*entry)());

// Stops `from` here and goes on in `to`; returns when something switches back to `from`.
void switch_context(Context& from, Context& to);

// To be called first by every entry().
void entered();

}  // namespace ppnet::emulator
