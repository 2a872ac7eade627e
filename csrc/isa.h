// The instruction set whose kernels run: the best one this processor has, unless a test asks for another.
#pragma once

#include <string>

namespace ppnet {

// avx512_bf16 adds bf16 dot products and 16-bit compress and expand: Zen 4, Sapphire Rapids and later.
enum class Isa { base, avx2, avx512, avx512_bf16 };

Isa current_isa();
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

// The name of one, or "auto" for the best one. Returns "" or the reason why it cannot be used.
std::string set_isa(const std::string& name);

}  // namespace ppnet

// Prototype of one kernel in every namespace it is compiled into (see CMakeLists.txt), and the choice among them.
#if defined(__x86_64__)
#define PPNET_KERNEL(declaration)       \
  namespace isa_base { declaration; }   \
  namespace isa_avx2 { declaration; }   \
  namespace isa_avx512 { declaration; } \
  namespace isa_avx512_bf16 { declaration; }
#define PPNET_PICK(kernel)                                                                  \
  (::ppnet::current_isa() == ::ppnet::Isa::avx512_bf16 ? ::ppnet::isa_avx512_bf16::kernel \
   : ::ppnet::current_isa() == ::ppnet::Isa::avx512    ? ::ppnet::isa_avx512::kernel      \
   : ::ppnet::current_isa() == ::ppnet::Isa::avx2      ? ::ppnet::isa_avx2::kernel        \
                                                       : ::ppnet::isa_base::kernel)
#else
#define PPNET_KERNEL(declaration) \
  namespace isa_base { declaration; }
#define PPNET_PICK(kernel) (::ppnet::isa_base::kernel)
#endif
