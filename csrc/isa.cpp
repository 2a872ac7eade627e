#include "isa.h"

#include <atomic>

namespace ppnet {
namespace {

constexpr Isa kBestFirst[] = {Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::base};

Isa best_isa() {
  for (Isa isa : kBestFirst)
    if (isa_supported(isa)) return isa;
  return Isa::base;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    // The flags of ISA_FLAGS_* in CMakeLists.txt.
    case Isa::avx512_bf16:
      return isa_supported(Isa::avx512) && __builtin_cpu_supports("avx512vbmi2") &&
             __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    case Isa::avx512:
      return isa_supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512cd");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
             __builtin_cpu_supports("f16c");
    case Isa::base:
      return true;
  }
  return false;
#else
  return isa == Isa::base;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::base: break;
  }
  return "base";
}

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

std::string set_isa(const std::string& name) {
  if (name == "auto") {
    chosen().store(best_isa());
    return "";
  }
  for (Isa isa : kBestFirst) {
    if (name != isa_name(isa)) continue;
    if (!isa_supported(isa)) return "this processor does not have '" + name + "'";
    chosen().store(isa);
    return "";
  }
  return "unknown instruction set '" + name + "': expected auto, base, avx2, avx512 or avx512_bf16";
}

}  // namespace ppnet
