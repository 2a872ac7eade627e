// Kernels are local functions, which dladdr does not know; GCC loses the section attribute of variables in templates.
// Both are in the full table of symbols, so the library must not be stripped.
#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>

namespace ppnet::emulator {
namespace {

struct Symbol {
  std::string name;
  uint8_t* address;
  size_t bytes;
  bool writable;
};

template <class T>
std::vector<T> read_table(std::ifstream& file, uint64_t at, uint64_t bytes) {
  std::vector<T> table(bytes / sizeof(T));
  file.seekg(static_cast<std::streamoff>(at));
  file.read(reinterpret_cast<char*>(table.data()), static_cast<std::streamsize>(table.size() * sizeof(T)));
  return table;
}

std::vector<Symbol> read_symbols() {
  std::vector<Symbol> symbols;
  Dl_info library{};
  if (dladdr(reinterpret_cast<const void*>(&name_of), &library) == 0) return symbols;
  std::ifstream file(library.dli_fname, std::ios::binary);
  if (!file) return symbols;
  const auto header = read_table<ElfW(Ehdr)>(file, 0, sizeof(ElfW(Ehdr)));
  const auto sections = read_table<ElfW(Shdr)>(file, header[0].e_shoff, header[0].e_shnum * sizeof(ElfW(Shdr)));
  for (const auto& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    const auto& names_section = sections[section.sh_link];
    const auto names = read_table<char>(file, names_section.sh_offset, names_section.sh_size);
    for (const auto& symbol : read_table<ElfW(Sym)>(file, section.sh_offset, section.sh_size)) {
      if (symbol.st_shndx == SHN_UNDEF || symbol.st_shndx >= sections.size()) continue;
      symbols.push_back({&names[symbol.st_name], static_cast<uint8_t*>(library.dli_fbase) + symbol.st_value,
                         symbol.st_size, (sections[symbol.st_shndx].sh_flags & SHF_WRITE) != 0});
    }
  }
  return symbols;
}

const std::vector<Symbol>& all_symbols() {
  static const std::vector<Symbol> symbols = read_symbols();
  return symbols;
}

// The mangled name of a function's variable up to its own part, where that begins with the marker of keywords.h.
constexpr char kMarker[] = "ppnet_shared_";

std::vector<Range> find_shared_variables() {
  std::set<std::string> functions;
  for (const Symbol& s : all_symbols()) {
    size_t at = s.name.find(kMarker);
    if (at == std::string::npos || s.name.rfind("_ZZ", 0) != 0) continue;
    while (at > 0 && s.name[at - 1] >= '0' && s.name[at - 1] <= '9') --at;  // the length of the name
    functions.insert(s.name.substr(0, at));
  }
  std::vector<Range> ranges;
  for (const Symbol& s : all_symbols()) {
    if (!s.writable || s.bytes == 0 || s.name.find(kMarker) != std::string::npos) continue;
    // The function whose mangled name begins this one is the last that is not greater.
    auto after = functions.upper_bound(s.name);
    if (after == functions.begin() || s.name.rfind(*--after, 0) != 0) continue;
    ranges.push_back({s.address, s.bytes});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  return ranges;
}

}  // namespace

const std::vector<Range>& shared_variables() {
  static const std::vector<Range> ranges = find_shared_variables();
  return ranges;
}

const char* name_of(const void* function) {
  static std::string name;
  char address[32];
  std::snprintf(address, sizeof address, "%p", function);
  name = address;
  for (const Symbol& s : all_symbols()) {
    if (s.address != function || s.bytes == 0) continue;
    int status = 0;
    char* readable = abi::__cxa_demangle(s.name.c_str(), nullptr, nullptr, &status);
    name = readable ? readable : s.name;
    std::free(readable);
    break;
  }
  for (const std::string noise : {"(anonymous namespace)::", "ppnet::cuda::", "void "})
    for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, noise.size());
  return name.c_str();
}

}  // namespace ppnet::emulator
