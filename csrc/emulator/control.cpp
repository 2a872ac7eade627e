// What the tests steer the emulator with, through ctypes.
#include "block.h"

#define PPNET_EXPORT extern "C" __attribute__((visibility("default")))

PPNET_EXPORT void ppnet_emulator_set_seed(uint64_t seed) { ppnet::emulator::set_seed(seed); }
PPNET_EXPORT uint64_t ppnet_emulator_seed() { return ppnet::emulator::seed(); }
PPNET_EXPORT const char* ppnet_emulator_message() { return ppnet::emulator::message(); }

PPNET_EXPORT int ppnet_emulator_sanitized() {
#ifdef __SANITIZE_ADDRESS__
  return 1;
#else
  return 0;
#endif
}
