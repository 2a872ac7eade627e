#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ppnet {
namespace {

using Clock = std::chrono::steady_clock;
constexpr long kLine = 64;

struct Buffer {
  explicit Buffer(long bytes)
      : data(static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{4096}))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t{4096}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data;
};

void copy(char* to, const char* from, long bytes) {
#if defined(__x86_64__)
  for (long i = 0; i < bytes; i += kLine) {
    for (long j = 0; j < kLine; j += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + j),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(from + i + j)));
  }
  _mm_sfence();
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// Eight independent sums keep enough loads in flight; the result is returned so that the loop stays.
uint64_t read(const char* from, long bytes) {
  uint64_t sum[8] = {};
  const auto* words = reinterpret_cast<const uint64_t*>(from);
  for (long i = 0; i < bytes / 8; i += 8)
    for (long j = 0; j < 8; ++j) sum[j] += words[i + j];
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

// Runs body(begin, end) over line-aligned shares of `bytes`, on `threads` threads, until `seconds` are over.
// A pass starts for all threads together; the best pass counts, as other work on the machine only ever slows one down.
template <class Body>
double best_pass(long bytes, int threads, double seconds, const Body& body) {
  std::atomic<int> arrived{0};
  std::atomic<long> pass{0};
  std::atomic<bool> stop{false};
  double best = 1e30;
  Clock::time_point start;
  const auto limit = Clock::now() + std::chrono::duration<double>(seconds);
  const auto share = [&](int t) { return bytes / kLine * t / threads * kLine; };
  const auto barrier = [&](const auto& by_last) {
    const long now = pass.load();
    if (arrived.fetch_add(1) + 1 == threads) {
      by_last();
      arrived.store(0);
      pass.store(now + 1);
    } else {
      while (pass.load() == now) std::this_thread::yield();
    }
  };
  const auto work = [&](int t) {
    body(share(t), share(t + 1));  // touches the pages, and warms up
    while (true) {
      barrier([&] {
        stop.store(Clock::now() >= limit && best < 1e30);
        start = Clock::now();
      });
      if (stop.load()) return;
      body(share(t), share(t + 1));
      barrier([&] { best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count()); });
    }
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(work, t);
  work(0);
  for (auto& thread : pool) thread.join();
  return best;
}

}  // namespace

double copy_bandwidth(long bytes, int threads, double seconds) {
  bytes = bytes / kLine * kLine;
  const Buffer from(bytes), to(bytes);
  std::memset(from.data, 1, static_cast<size_t>(bytes));
  const double time = best_pass(bytes, threads, seconds,
                                [&](long begin, long end) { copy(to.data + begin, from.data + begin, end - begin); });
  return 2.0 * static_cast<double>(bytes) / time * 1e-9;
}

double read_bandwidth(long bytes, int threads, double seconds) {
  bytes = bytes / kLine * kLine;
  const Buffer from(bytes);
  std::memset(from.data, 1, static_cast<size_t>(bytes));
  std::atomic<uint64_t> sink{0};
  const double time = best_pass(bytes, threads, seconds,
                                [&](long begin, long end) { sink += read(from.data + begin, end - begin); });
  return static_cast<double>(bytes) / time * 1e-9;
}

}  // namespace ppnet
