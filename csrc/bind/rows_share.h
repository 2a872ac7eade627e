// How the operators on rows divide their work among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "memory.h"

namespace ppnet {

// A thread is worth waking for this much memory traffic. The work is divided into at most kSharesPerThread shares per
// thread, of at least kBytesPerShare.
constexpr int64_t kBytesPerShare = 1 << 19, kSharesPerThread = 8;

// One tensor's work: how many units, and the memory traffic of each.
struct Load {
  int64_t units, unit_bytes;
};

// Calls thread() once on every thread, and what it returns with (i, first, last) for units [first, last) of loads[i].
// Shares are of about equal bytes, so that one large tensor and many small ones both balance, and a thread takes the
// next one when it is done: where another process holds a core, the other threads go on. No result may depend on who
// computed it.
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

}  // namespace ppnet
