#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ppnet {
namespace {

using Clock = std::chrono::steady_clock;
constexpr long kLine = 64;
constexpr long kPage = 4096;  // a share of the bytes is a multiple of it

// A body works on kStreams equal pieces of its bytes (a multiple of 4096, thus of one step of all streams) at once, so
// that several pages are open and several hardware prefetchers run. Sums are returned so that the loads stay. Software
// prefetches and more streams were measured, too, and gained nothing.
using ReadBody = uint64_t (*)(const char* from, long bytes);
using CopyBody = void (*)(char* to, const char* from, long bytes);

// Several arrays read and several written in step, as an operator does that combines tensors: every line written is the
// exclusive or of the lines read. A memory that reads and writes at once takes some proportions better than others.
struct Mix {
  static constexpr int kMost = 3;
  int reads, writes;
  const char* from[kMost];
  char* to[kMost];
};
using MixBody = void (*)(const Mix& mix, long begin, long end);
constexpr long kStep = 4 * kLine;  // of each array at a time

uint64_t read_words(const char* from, long bytes) {
  uint64_t sum[8] = {};
  const auto* words = reinterpret_cast<const uint64_t*>(from);
  for (long i = 0; i < bytes / 8; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] += words[i + j];
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

void copy_library(char* to, const char* from, long bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }

void mix_words(const Mix& mix, long begin, long end) {
  for (long at = begin; at < end; at += kStep) {
    uint64_t words[kStep / 8] = {}, more[kStep / 8];
    for (int r = 0; r < mix.reads; ++r) {
      std::memcpy(more, mix.from[r] + at, sizeof more);
      for (long j = 0; j < kStep / 8; ++j) words[j] ^= more[j];
    }
    for (int w = 0; w < mix.writes; ++w) std::memcpy(mix.to[w] + at, words, sizeof words);
  }
}

#if defined(__x86_64__)
template <int kStreams>
__attribute__((target("avx2"))) uint64_t read_avx2(const char* from, long bytes) {
  const long piece = bytes / kStreams;
  __m256i sum[2 * kStreams];
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (long i = 0; i < piece; i += kLine)
    for (int s = 0; s < kStreams; ++s) {
      const auto* line = reinterpret_cast<const __m256i*>(from + s * piece + i);
      sum[2 * s] = _mm256_xor_si256(sum[2 * s], _mm256_load_si256(line));
      sum[2 * s + 1] = _mm256_xor_si256(sum[2 * s + 1], _mm256_load_si256(line + 1));
    }
  uint64_t out = 0;
  for (auto& s : sum) out ^= static_cast<uint64_t>(_mm256_extract_epi64(s, 0));
  return out;
}

template <int kStreams>
__attribute__((target("avx512f"))) uint64_t read_avx512(const char* from, long bytes) {
  const long piece = bytes / kStreams;
  __m512i sum[kStreams][2];
  for (auto& s : sum) s[0] = s[1] = _mm512_setzero_si512();
  for (long i = 0; i < piece; i += 2 * kLine)
    for (int s = 0; s < kStreams; ++s) {
      const char* line = from + s * piece + i;
      sum[s][0] = _mm512_xor_si512(sum[s][0], _mm512_load_si512(line));
      sum[s][1] = _mm512_xor_si512(sum[s][1], _mm512_load_si512(line + kLine));
    }
  uint64_t out = 0;
  for (auto& s : sum) {
    uint64_t words[8];
    _mm512_storeu_si512(words, _mm512_xor_si512(s[0], s[1]));
    out ^= words[0];
  }
  return out;
}

template <int kStreams>
__attribute__((target("avx2"))) void stream_avx2(char* to, const char* from, long bytes) {
  const long piece = bytes / kStreams;
  for (long i = 0; i < piece; i += kLine)
    for (int s = 0; s < kStreams; ++s)
      for (long j = 0; j < kLine; j += 32) {
        const long at = s * piece + i + j;
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at),
                            _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at)));
      }
  _mm_sfence();
}

template <int kStreams>
__attribute__((target("avx512f"))) void stream_avx512(char* to, const char* from, long bytes) {
  const long piece = bytes / kStreams;
  for (long i = 0; i < piece; i += 4 * kLine)
    for (int s = 0; s < kStreams; ++s)
      for (long j = 0; j < 4 * kLine; j += kLine) {
        const long at = s * piece + i + j;
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_load_si512(from + at));
      }
  _mm_sfence();
}

template <int kStreams>
__attribute__((target("avx2"))) void mix_avx2(const Mix& mix, long begin, long end) {
  const long piece = (end - begin) / kStreams;
  for (long i = 0; i < piece; i += kStep)
    for (int s = 0; s < kStreams; ++s) {
      const long at = begin + s * piece + i;
      __m256i part[kStep / 32] = {};
      for (int r = 0; r < mix.reads; ++r) {
        const auto* from = reinterpret_cast<const __m256i*>(mix.from[r] + at);
        for (long j = 0; j < kStep / 32; ++j) part[j] = _mm256_xor_si256(part[j], _mm256_load_si256(from + j));
      }
      for (int w = 0; w < mix.writes; ++w)
        for (long j = 0; j < kStep / 32; ++j)
          _mm256_stream_si256(reinterpret_cast<__m256i*>(mix.to[w] + at) + j, part[j]);
    }
  _mm_sfence();
}

template <int kStreams>
__attribute__((target("avx512f"))) void mix_avx512(const Mix& mix, long begin, long end) {
  const long piece = (end - begin) / kStreams;
  for (long i = 0; i < piece; i += kStep)
    for (int s = 0; s < kStreams; ++s) {
      const long at = begin + s * piece + i;
      __m512i line[kStep / kLine] = {};
      for (int r = 0; r < mix.reads; ++r)
        for (long j = 0; j < kStep / kLine; ++j)
          line[j] = _mm512_xor_si512(line[j], _mm512_load_si512(mix.from[r] + at + j * kLine));
      for (int w = 0; w < mix.writes; ++w)
        for (long j = 0; j < kStep / kLine; ++j)
          _mm512_stream_si512(reinterpret_cast<__m512i*>(mix.to[w] + at) + j, line[j]);
    }
  _mm_sfence();
}
#endif

template <class Body>
struct Variant {
  const char* name;
  Body body;
};

std::vector<Variant<ReadBody>> read_variants() {
  std::vector<Variant<ReadBody>> found{{"words", read_words}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    found.push_back({"avx2, 2 streams", read_avx2<2>});
    found.push_back({"avx2, 4 streams", read_avx2<4>});
  }
  if (__builtin_cpu_supports("avx512f")) {
    found.push_back({"avx512, 1 stream", read_avx512<1>});
    found.push_back({"avx512, 4 streams", read_avx512<4>});
  }
#endif
  return found;
}

std::vector<Variant<CopyBody>> copy_variants() {
  std::vector<Variant<CopyBody>> found{{"memcpy", copy_library}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    found.push_back({"avx2 non-temporal, 1 stream", stream_avx2<1>});
    found.push_back({"avx2 non-temporal, 4 streams", stream_avx2<4>});
  }
  if (__builtin_cpu_supports("avx512f")) {
    found.push_back({"avx512 non-temporal, 1 stream", stream_avx512<1>});
    found.push_back({"avx512 non-temporal, 2 streams", stream_avx512<2>});
    found.push_back({"avx512 non-temporal, 4 streams", stream_avx512<4>});
  }
#endif
  return found;
}

std::vector<Variant<MixBody>> mix_variants() {
  std::vector<Variant<MixBody>> found{{"words", mix_words}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    found.push_back({"avx2 non-temporal, 1 stream", mix_avx2<1>});
    found.push_back({"avx2 non-temporal, 4 streams", mix_avx2<4>});
  }
  if (__builtin_cpu_supports("avx512f")) {
    found.push_back({"avx512 non-temporal, 1 stream", mix_avx512<1>});
    found.push_back({"avx512 non-temporal, 2 streams", mix_avx512<2>});
    found.push_back({"avx512 non-temporal, 4 streams", mix_avx512<4>});
  }
#endif
  return found;
}

// Runs body(begin, end) over the shares of `bytes`, on `threads` threads, until `seconds` are over.
// A pass starts for all threads together, and the first does not count. Returns the mean seconds of a pass: what is
// compared with it is a mean over calls, and other work on the machine then slows both alike.
template <class Body>
double mean_pass(long bytes, int threads, double seconds, const Body& body) {
  std::atomic<int> arrived{0};
  std::atomic<long> pass{0};
  std::atomic<bool> stop{false};
  double total = 0.0;
  long passes = -1;
  Clock::time_point start;
  const auto limit = Clock::now() + std::chrono::duration<double>(seconds);
  const auto share = [&](int t) { return bytes / kPage * t / threads * kPage; };
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
    while (true) {
      barrier([&] {
        stop.store(Clock::now() >= limit && passes > 0);
        start = Clock::now();
      });
      if (stop.load()) return;
      body(share(t), share(t + 1));
      barrier([&] {
        if (++passes > 0) total += std::chrono::duration<double>(Clock::now() - start).count();
      });
    }
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(work, t);
  work(0);
  for (auto& thread : pool) thread.join();
  return total / static_cast<double>(passes);
}

// Pages of its own, whatever the C library keeps: advice only holds for pages that were never touched.
char* allocate(long bytes, bool huge_pages) {
  const auto size = static_cast<size_t>(bytes);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  madvise(data, size, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);  // where there are none, ordinary ones are read
#else
  void* data = ::operator new(size, std::align_val_t{kPage});
  (void)huge_pages;
#endif
  std::memset(data, 1, size);
  return static_cast<char*>(data);
}

void release(char* data, long bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  munmap(data, static_cast<size_t>(bytes));
#else
  (void)bytes;
  ::operator delete(data, std::align_val_t{kPage});
#endif
}

}  // namespace

MemoryProbe::MemoryProbe(long bytes, int threads, bool huge_pages) : bytes_(bytes / kPage * kPage), threads_(threads) {
  from_ = allocate(bytes_, huge_pages);
  try {
    to_ = allocate(bytes_, huge_pages);
  } catch (...) {
    release(from_, bytes_);
    throw;
  }
}

MemoryProbe::~MemoryProbe() {
  release(from_, bytes_);
  release(to_, bytes_);
}

double MemoryProbe::run_read(int body, double seconds) {
  const auto variant = read_variants()[static_cast<size_t>(body)];
  std::atomic<uint64_t> sink{0};
  const double time = mean_pass(bytes_, threads_, seconds, [&](long begin, long end) {
    sink += variant.body(from_ + begin, end - begin);
  });
  return static_cast<double>(bytes_) / time * 1e-9;
}

double MemoryProbe::run_copy(int body, double seconds) {
  const auto variant = copy_variants()[static_cast<size_t>(body)];
  const double time = mean_pass(bytes_, threads_, seconds, [&](long begin, long end) {
    variant.body(to_ + begin, from_ + begin, end - begin);
  });
  return 2.0 * static_cast<double>(bytes_) / time * 1e-9;
}

double MemoryProbe::run_mix(int body, int reads, int writes, double seconds) {
  const auto variant = mix_variants()[static_cast<size_t>(body)];
  const long each = bytes_ / std::max(reads, writes) / kPage * kPage;
  Mix mix{reads, writes, {}, {}};
  for (int r = 0; r < reads; ++r) mix.from[r] = from_ + r * each;
  for (int w = 0; w < writes; ++w) mix.to[w] = to_ + w * each;
  const double time = mean_pass(each, threads_, seconds, [&](long begin, long end) { variant.body(mix, begin, end); });
  return static_cast<double>((reads + writes) * each) / time * 1e-9;
}

double MemoryProbe::mix(int reads, int writes, double seconds) {
  if (reads < 1 || reads > Mix::kMost || writes < 1 || writes > Mix::kMost)
    throw std::invalid_argument("MemoryProbe: reads is " + std::to_string(reads) + ", writes is " +
                                std::to_string(writes) + ", allowed are 1 .. " + std::to_string(Mix::kMost));
  return run_mix(mix_body_, reads, writes, seconds);
}

double MemoryProbe::read(double seconds) { return run_read(read_body_, seconds); }
double MemoryProbe::copy(double seconds) { return run_copy(copy_body_, seconds); }
std::string MemoryProbe::read_body() const { return read_variants()[static_cast<size_t>(read_body_)].name; }
std::string MemoryProbe::copy_body() const { return copy_variants()[static_cast<size_t>(copy_body_)].name; }
std::string MemoryProbe::mix_body() const { return mix_variants()[static_cast<size_t>(mix_body_)].name; }

void MemoryProbe::tune(double seconds) {
  constexpr int kTurns = 3;  // a disturbance must not hit all tries of one body
  double best_read = 0.0, best_copy = 0.0, best_mix = 0.0;
  for (int turn = 0; turn < kTurns; ++turn) {
    for (int i = 0; i < static_cast<int>(read_variants().size()); ++i) {
      const double rate = run_read(i, seconds / kTurns);
      if (rate > best_read) best_read = rate, read_body_ = i;
    }
    for (int i = 0; i < static_cast<int>(copy_variants().size()); ++i) {
      const double rate = run_copy(i, seconds / kTurns);
      if (rate > best_copy) best_copy = rate, copy_body_ = i;
    }
    for (int i = 0; i < static_cast<int>(mix_variants().size()); ++i) {
      const double rate = run_mix(i, 2, 1, seconds / kTurns);
      if (rate > best_mix) best_mix = rate, mix_body_ = i;
    }
  }
}

}  // namespace ppnet
