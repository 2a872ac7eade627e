// ppnet._host: what was built, what this machine has, and what its memory sustains.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __linux__
#include <malloc.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <climits>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include "bandwidth.h"
#include "cache.h"

namespace py = pybind11;

namespace {

constexpr long kLeastBytes = 1 << 16;

py::dict build_info() {
  py::dict info;
  info["compiler"] = PPNET_COMPILER;
  info["isas"] = PPNET_ISAS;
  info["torch"] = PPNET_TORCH_BUILD;
  info["cuda_archs"] = PPNET_CUDA_ARCHS;
  info["cuda_reason"] = PPNET_CUDA_WHY;
  info["nvcc"] = PPNET_NVCC;
  return info;
}

// Bytes; 0 where the system does not say.
std::map<std::string, int64_t> cache_sizes() {
  return {{"l1d", ppnet::cache_size(0)}, {"l2", ppnet::cache_size(2)}, {"l3", ppnet::cache_size(3)}};
}

// malloc returns large blocks to the system when they are freed and maps new ones, page fault by page fault, when the
// next tensor of that size is made. Kept instead, they are reused: on the CPU this is worth a multiple for any operator
// whose large output is short-lived. Returns false where the C library cannot.
bool keep_freed_memory() {
#ifdef M_MMAP_MAX
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, INT_MAX) == 1;
#else
  return false;
#endif
}

// Gives `bytes` at `address` pages of 2 MB, in place, whatever is mapped there now: ordinary pages cost a walk through
// the page tables every 4 KB that are read. False where that cannot be: before Linux 6.1, of a file, without free
// pages.
bool use_large_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  const auto advise = [](uintptr_t begin, uintptr_t end) {
    const auto start = reinterpret_cast<void*>(begin);  // NOLINT: an address is what Python knows
    const size_t size = end - begin;
    return begin >= end || (madvise(start, size, MADV_HUGEPAGE) == 0 && madvise(start, size, kCollapse) == 0);
  };
  const uintptr_t end = address + bytes, first = address / kPage * kPage, last = (end + kPage - 1) / kPage * kPage;
  const uintptr_t inner_first = (address + kPage - 1) / kPage * kPage, inner_last = end / kPage * kPage;
  if (!advise(inner_first, inner_last)) return false;
  // The pages at both ends are shared with other memory of the process, and may reach beyond it: then they stay small.
  advise(first, inner_first);
  advise(std::max(inner_last, first + kPage), last);
  return true;
#else
  (void)address;
  (void)bytes;
  return false;
#endif
}

std::unique_ptr<ppnet::MemoryProbe> memory_probe(long bytes, int threads, bool huge_pages) {
  if (bytes < kLeastBytes)
    throw py::value_error("MemoryProbe: bytes is " + std::to_string(bytes) + ", at least " +
                          std::to_string(kLeastBytes));
  if (threads < 1 || threads > 1024)
    throw py::value_error("MemoryProbe: threads is " + std::to_string(threads) + ", allowed are 1 .. 1024");
  py::gil_scoped_release release;
  return std::make_unique<ppnet::MemoryProbe>(bytes, threads, huge_pages);
}

double bandwidth(double (ppnet::MemoryProbe::*sample)(double), long bytes, int threads, double seconds) {
  const auto probe = memory_probe(bytes, threads, true);
  py::gil_scoped_release release;
  probe->tune(seconds / 8);
  return (*probe.*sample)(seconds);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build and processor information, and memory bandwidth probes.";
  m.def("build_info", &build_info, "Compiler, instruction sets, torch and CUDA architectures of the build.");
  m.def("cache_sizes", &cache_sizes, "Bytes of the l1d, l2 and l3 caches; 0 where unknown.");
  m.def("keep_freed_memory", &keep_freed_memory,
        "Keep freed memory in the process for the next tensor, for the rest of the process. Whether that is possible.");
  m.def("use_large_pages", &use_large_pages, py::arg("address"), py::arg("bytes"),
        py::call_guard<py::gil_scoped_release>(),
        "Pages of 2 MB for memory of this process, in place. Whether that was possible.");
  m.def("cores", [] { return static_cast<int>(std::thread::hardware_concurrency()); }, "Number of logical cores.");
  m.def(
      "copy_bandwidth",
      [](long bytes, int threads, double seconds) {
        return bandwidth(&ppnet::MemoryProbe::copy, bytes, threads, seconds);
      },
      py::arg("bytes"), py::arg("threads"), py::arg("seconds") = 0.2,
      "GB/s (bytes read + bytes written) of copying `bytes`: the best body, mean of the passes in `seconds`.");
  m.def(
      "read_bandwidth",
      [](long bytes, int threads, double seconds) {
        return bandwidth(&ppnet::MemoryProbe::read, bytes, threads, seconds);
      },
      py::arg("bytes"), py::arg("threads"), py::arg("seconds") = 0.2,
      "GB/s of reading `bytes`: the best body, mean of the passes in `seconds`.");
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<ppnet::MemoryProbe>(m, "MemoryProbe", "Buffers that stay allocated, for samples between timed calls.")
      .def(py::init(&memory_probe), py::arg("bytes"), py::arg("threads"), py::arg("huge_pages") = true)
      .def("tune", &ppnet::MemoryProbe::tune, py::arg("seconds"), unlocked,
           "Tries every body of reading, copying and both for `seconds`, in turns; the fastest is used from then on.")
      .def("read", &ppnet::MemoryProbe::read, py::arg("seconds"), unlocked, "GB/s, mean of the passes in `seconds`.")
      .def("copy", &ppnet::MemoryProbe::copy, py::arg("seconds"), unlocked,
           "GB/s (bytes read + written), mean of the passes in `seconds`.")
      .def("mix", &ppnet::MemoryProbe::mix, py::arg("reads"), py::arg("writes"), py::arg("seconds"), unlocked,
           "GB/s (bytes read + written) of reading `reads` arrays and writing `writes` in step, 1 .. 3 each.")
      .def_property_readonly("read_body", &ppnet::MemoryProbe::read_body)
      .def_property_readonly("copy_body", &ppnet::MemoryProbe::copy_body)
      .def_property_readonly("mix_body", &ppnet::MemoryProbe::mix_body);
}
