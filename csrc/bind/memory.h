// What bindings need to know about memory: the size of the last-level cache, and large pages below new outputs.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "cache.h"

namespace ppnet {

// A thread is worth waking for this much memory traffic.
constexpr int64_t kBytesPerThread = 1 << 17;

// Bytes of the last-level cache; a guess where the system does not say.
inline int64_t cache_bytes() {
  static const int64_t bytes = [] {
    const int64_t size = cache_size(3);
    return size > 0 ? size : int64_t{32} << 20;
  }();
  return bytes;
}

// Asks for large pages below a large new output. Memory fresh from the system is otherwise mapped 4 KB at a time while
// it is written: on a virtual machine that took three times as long as a copy itself.
inline void advise_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (start + kPage - 1) / kPage * kPage;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (memory && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace ppnet
