// Shared memory of a block, static and dynamic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ppnet::emulator {

constexpr uint8_t kPoison = 0xff;  // fresh shared memory: NaN in every floating-point format, -1 as an integer

// Fills all `__shared__` variables with poison.
void poison_variables();

// Dynamic shared memory of a launch, between guards that AddressSanitizer watches; without it, writes are found later.
class Shared {
 public:
  explicit Shared(size_t bytes);
  ~Shared();
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;

  uint8_t* begin() const;
  void poison();
  bool guards_untouched();

 private:
  bool untouched(size_t begin, size_t end) const;
  void watch(bool on);
  size_t bytes_, rounded_;
  uint8_t* memory_;
};

}  // namespace ppnet::emulator
