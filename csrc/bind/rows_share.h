// How the operators on rows divide their work among threads, and what they ask of the memory of their outputs.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <vector>

namespace ppnet {

// A thread is worth waking for this much memory traffic. The work is divided into at most kSharesPerThread shares per
// thread, of at least kBytesPerShare.
constexpr int64_t kBytesPerThread = 1 << 17, kBytesPerShare = 1 << 19, kSharesPerThread = 8;

// One tensor's work: how many units, and the memory traffic of each.
struct Load {
  int64_t units, unit_bytes;
};

// Calls thread() once on every thread, and what it returns with (i, first, last) for units [first, last) of loads[i].
// Shares are of about equal bytes, so that one large tensor and many small ones both balance, and a thread takes the next
// one when it is done: where another process holds a core, the other threads go on. No result may depend on who computed it.
template <class Thread>
void share(const std::vector<Load>& loads, const Thread& thread) {
  std::vector<int64_t> start{0};  // of every load, on an axis of bytes
  for (const Load& load : loads) start.push_back(start.back() + load.units * load.unit_bytes);
  const int64_t total = start.back();
  const int64_t threads =
      std::clamp<int64_t>(total / kBytesPerThread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t shares =
      threads == 1 ? 1 : std::max(threads, std::min(total / kBytesPerShare, threads * kSharesPerThread));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto&& work = thread();
    for (int64_t s; (s = next.fetch_add(1)) < shares;) {
      const int64_t begin = total / shares * s, end = s + 1 == shares ? total : total / shares * (s + 1);
      for (size_t i = 0; i < loads.size(); ++i) {
        if (start[i] >= end || start[i + 1] <= begin) continue;
        // A unit belongs to the share in which it starts.
        const int64_t unit = loads[i].unit_bytes;
        const auto first_from = [&](int64_t at) { return (std::max<int64_t>(at - start[i], 0) + unit - 1) / unit; };
        const int64_t first = first_from(begin), last = std::min(first_from(end), loads[i].units);
        if (first < last) work(i, first, last);
      }
    }
  });
}

// Bytes of the last-level cache, from sysfs: sysconf adds up the caches of all sockets on some virtual machines.
inline int64_t last_level_cache() {
  static const int64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t size = 0;
    char unit = 0;
    file >> size >> unit;
    return size > 0 ? size << (unit == 'M' ? 20 : unit == 'K' ? 10 : 0) : int64_t{32} << 20;
  }();
  return bytes;
}

// Asks for large pages below a large new output. Memory fresh from the system is otherwise mapped 4 KB at a time while it
// is written: on a virtual machine that took three times as long as the copy itself.
inline void advise_large_pages(const void* out, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (out && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)out, (void)bytes;
#endif
}

}  // namespace ppnet
