#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef PPNET_EMULATOR_UCONTEXT
extern "C" __attribute__((visibility("hidden"))) void ppnet_emulator_switch(void** from, void* to);
#endif

// Pushes what a called function must preserve, exchanges the stacks, and pops the same of the other context.
#if defined(PPNET_EMULATOR_UCONTEXT)
// swapcontext
#elif defined(__x86_64__)
asm(R"(
.text
.hidden ppnet_emulator_switch
.globl ppnet_emulator_switch
.type ppnet_emulator_switch,@function
ppnet_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ppnet_emulator_switch, .-ppnet_emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.hidden ppnet_emulator_switch
.globl ppnet_emulator_switch
.type ppnet_emulator_switch,%function
ppnet_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size ppnet_emulator_switch, .-ppnet_emulator_switch
)");
#endif

namespace ppnet::emulator {
namespace {

Context* left = nullptr;  // the context that the running one was switched to from

size_t guard_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

Stacks::~Stacks() {
  if (memory_) munmap(memory_, static_cast<size_t>(count_) * (kBytes + guard_bytes()));
}

char* Stacks::bottom(int i) const {
  return memory_ + static_cast<size_t>(i) * (kBytes + guard_bytes()) + guard_bytes();
}

void Stacks::reserve(int count) {
  if (count <= count_) return;
  this->~Stacks();
  const size_t each = kBytes + guard_bytes();
  void* memory = mmap(nullptr, static_cast<size_t>(count) * each, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("emulator: no memory for the stacks of a block's threads");
    std::abort();
  }
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (int i = 0; i < count; ++i) mprotect(bottom(i) - guard_bytes(), guard_bytes(), PROT_NONE);
}

void Stacks::clean() {
#ifdef __SANITIZE_ADDRESS__
  for (int i = 0; i < count_; ++i) __asan_unpoison_memory_region(bottom(i), kBytes);
#endif
}

void prepare(Context& context, char* stack_bottom, void (*entry)()) {
  context.bottom = stack_bottom;
  context.size = Stacks::kBytes;
  context.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
  // An entry() never returns, which leaves its frame marked.
  __asan_unpoison_memory_region(stack_bottom + Stacks::kBytes - 4096, 4096);
#endif
#ifdef PPNET_EMULATOR_UCONTEXT
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack_bottom;
  context.state.uc_stack.ss_size = Stacks::kBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
#elif defined(__x86_64__)
  // As if entry() had been called, its return address being null: backtraces end there.
  void** top = reinterpret_cast<void**>(stack_bottom + Stacks::kBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  context.stack_pointer = top;
#else
  void** top = reinterpret_cast<void**>(stack_bottom + Stacks::kBytes) - 20;
  std::memset(top, 0, 20 * sizeof(void*));
  top[11] = reinterpret_cast<void*>(entry);  // x30, to which ppnet_emulator_switch returns
  context.stack_pointer = top;
#endif
}

void switch_context(Context& from, Context& to) {
  left = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#ifdef PPNET_EMULATOR_UCONTEXT
  swapcontext(&from.state, &to.state);
#else
  ppnet_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, &left->bottom, &left->size);
#endif
}

void entered() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &left->bottom, &left->size);
#endif
}

}  // namespace ppnet::emulator
