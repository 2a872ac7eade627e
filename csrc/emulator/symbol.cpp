// Names of kernels for messages. They are local functions, which dladdr does not know: the library's full table of symbols
// does, so the library must not be stripped.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "block.h"

namespace ppnet::emulator {
namespace {

template <class T>
std::vector<T> read_table(std::ifstream& file, uint64_t at, uint64_t bytes) {
  std::vector<T> table(bytes / sizeof(T));
  file.seekg(static_cast<std::streamoff>(at));
  file.read(reinterpret_cast<char*>(table.data()), static_cast<std::streamsize>(table.size() * sizeof(T)));
  return table;
}

// The mangled name of the function at `value` of the library, or nothing.
std::string find_symbol(const char* path, uint64_t value) {
  std::ifstream file(path, std::ios::binary);
  const auto header = read_table<ElfW(Ehdr)>(file, 0, sizeof(ElfW(Ehdr)));
  const auto sections = read_table<ElfW(Shdr)>(file, header[0].e_shoff, header[0].e_shnum * sizeof(ElfW(Shdr)));
  for (const auto& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    for (const auto& symbol : read_table<ElfW(Sym)>(file, section.sh_offset, section.sh_size)) {
      if (symbol.st_value != value || (symbol.st_info & 0xf) != STT_FUNC) continue;
      std::string name;
      file.seekg(static_cast<std::streamoff>(sections[section.sh_link].sh_offset + symbol.st_name));
      std::getline(file, name, '\0');
      return name;
    }
  }
  return "";
}

}  // namespace

const char* name_of(const void* function) {
  static std::string name;
  char address[32];
  std::snprintf(address, sizeof address, "%p", function);
  name = address;
  Dl_info info{};
  if (dladdr(function, &info) == 0) return name.c_str();
  const uint64_t value = reinterpret_cast<uintptr_t>(function) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  const std::string mangled = find_symbol(info.dli_fname, value);
  if (mangled.empty()) return name.c_str();
  int status = 0;
  char* readable = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  name = readable ? readable : mangled;
  std::free(readable);
  for (const std::string noise : {"(anonymous namespace)::", "ppnet::cuda::", "void "})
    for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, noise.size());
  return name.c_str();
}

}  // namespace ppnet::emulator
