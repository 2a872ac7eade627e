// Cache sizes of the first processor, from sysfs: sysconf adds up the caches of all sockets on some virtual machines.
#pragma once

#include <cstdint>
#include <fstream>
#include <string>

namespace ppnet {

// Bytes of a cache by its index there: 0 is l1d, 2 is l2, 3 is l3. 0 where the system does not say.
inline int64_t cache_size(int index) {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
  int64_t size = 0;
  char unit = 0;
  file >> size >> unit;
  return size << (unit == 'M' ? 20 : unit == 'K' ? 10 : 0);
}

}  // namespace ppnet
