// What the library's own table of symbols tells: names of kernels, and where the `__shared__` variables are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ppnet::emulator {

struct Range {
  uint8_t* begin;
  size_t bytes;
};

// All `__shared__` variables of all kernels, by address.
const std::vector<Range>& shared_variables();

// The demangled name of a function of this library, without its namespaces, or its address.
const char* name_of(const void* function);

}  // namespace ppnet::emulator
