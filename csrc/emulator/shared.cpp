#include "shared.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "block.h"
#include "symbols.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace ppnet::emulator {
namespace {

constexpr size_t kAlign = 128;
constexpr size_t kGuard = 1024;  // bytes before and after that nobody may touch

}  // namespace

void poison_variables() {
  for (const Range& r : shared_variables()) std::memset(r.begin, kPoison, r.bytes);
}

Shared::Shared(size_t bytes)
    : bytes_(bytes),
      rounded_((bytes + kAlign - 1) / kAlign * kAlign),
      memory_(static_cast<uint8_t*>(std::aligned_alloc(kAlign, rounded_ + 2 * kGuard))) {
  std::memset(memory_, kPoison, rounded_ + 2 * kGuard);
  watch(true);
}

Shared::~Shared() {
  watch(false);
  std::free(memory_);
}

uint8_t* Shared::begin() const { return memory_ + kGuard; }

void Shared::poison() { std::memset(begin(), kPoison, bytes_); }

bool Shared::guards_untouched() {
  watch(false);
  const bool whole = untouched(0, kGuard) && untouched(kGuard + bytes_, rounded_ + 2 * kGuard);
  watch(true);
  return whole;
}

bool Shared::untouched(size_t begin, size_t end) const {
  while (begin < end && memory_[begin] == kPoison) ++begin;
  return begin == end;
}

void Shared::watch(bool on) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory_, rounded_ + 2 * kGuard);
  if (!on) return;
  __asan_poison_memory_region(memory_, kGuard);
  __asan_poison_memory_region(begin() + bytes_, rounded_ - bytes_ + kGuard);
#else
  (void)on;
#endif
}

bool in_shared(const void* p, size_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(p);
  if (begin >= block.shared && begin + bytes <= block.shared + block.shared_bytes) return true;
  const std::vector<Range>& ranges = shared_variables();
  auto after = std::upper_bound(ranges.begin(), ranges.end(), begin,
                                [](const uint8_t* x, const Range& r) { return x < r.begin; });
  return after != ranges.begin() && begin + bytes <= (--after)->begin + after->bytes;
}

}  // namespace ppnet::emulator
