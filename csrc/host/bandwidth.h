// Memory bandwidth of this machine: the ideal that the memory-bound operators are measured against.
#pragma once

#include <cstddef>
#include <string>

namespace ppnet {

// Two buffers that stay allocated, so that a sample between two timed calls costs a few passes and no page faults.
// Reading, copying and mixes of both each have several bodies (vector width of the processor, 1 to 4 streams per
// thread, plain or non-temporal stores); `tune` finds the fastest of them here, once.
class MemoryProbe {
 public:
  // Each of `threads` threads works on its own share of `bytes`. huge_pages: ask for 2 MB pages where the system has
  // them; with 4 KB pages the page walks are what is measured. Throws std::bad_alloc.
  MemoryProbe(long bytes, int threads, bool huge_pages);
  ~MemoryProbe();
  MemoryProbe(const MemoryProbe&) = delete;
  MemoryProbe& operator=(const MemoryProbe&) = delete;

  // GB/s, mean over the passes within `seconds`, at least one; copy counts bytes read + bytes written.
  double read(double seconds);
  double copy(double seconds);
  // The same of reading `reads` arrays and writing `writes` in step; 1 .. 3 each, or throws std::invalid_argument.
  double mix(int reads, int writes, double seconds);
  // Tries every body for `seconds` in all, in turns.
  void tune(double seconds);
  std::string read_body() const;
  std::string copy_body() const;
  std::string mix_body() const;

 private:
  double run_read(int body, double seconds);
  double run_copy(int body, double seconds);
  double run_mix(int body, int reads, int writes, double seconds);

  long bytes_;
  int threads_;
  char* from_ = nullptr;
  char* to_ = nullptr;
  int read_body_ = 0;
  int copy_body_ = 0;
  int mix_body_ = 0;
};

}  // namespace ppnet
