// Memory bandwidth of this machine: the ideal that the memory-bound operators are measured against.
#pragma once

namespace ppnet {

// GB/s, best pass within `seconds`; each of `threads` threads works on its own share of `bytes`.
double copy_bandwidth(long bytes, int threads, double seconds);
double read_bandwidth(long bytes, int threads, double seconds);

}  // namespace ppnet
