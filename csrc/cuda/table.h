// One launch for many tensors, whose descriptors travel as a kernel parameter: the work of all is numbered in tiles.
#pragma once

#include <cstdint>

#include "launch.h"
#include "sizes.h"

namespace ppnet::cuda {

// Tensor t has the tiles tile_end[t - 1] .. tile_end[t].
template <class Tensor, int kMost>
struct TileTable {
  Tensor tensors[kMost];
  int64_t tile_end[kMost];
  int n;
};

// The tensor that a tile belongs to; `tile` becomes relative to it.
template <class Tensor, int kMost>
__device__ inline const Tensor& find(const TileTable<Tensor, kMost>& table, int64_t& tile) {
  int t = 0;
  while (tile >= table.tile_end[t]) ++t;
  if (t > 0) tile -= table.tile_end[t - 1];
  return table.tensors[t];
}

// Launches `kernel` over the chosen tensors, kMost at a time. Blocks stride over the tiles.
template <class Tensor, int kMost, class Tiles, class Wanted>
cudaError_t launch_over(void (*kernel)(TileTable<Tensor, kMost>), const Tensor* tensors, int n, cudaStream_t stream,
                        int threads, int64_t tiles_per_block, Tiles tiles_of, Wanted wanted) {
  static_assert(sizeof(TileTable<Tensor, kMost>) <= 4096, "kernel parameters are limited to 4 KB");
  constexpr int64_t kMostBlocks = 1 << 20;
  TileTable<Tensor, kMost> table;
  table.n = 0;
  int64_t tiles = 0;
  for (int i = 0; i <= n; ++i) {
    if (i < n && wanted(tensors[i]) && tiles_of(tensors[i]) > 0) {
      tiles += tiles_of(tensors[i]);
      table.tensors[table.n] = tensors[i];
      table.tile_end[table.n++] = tiles;
    }
    if (table.n == kMost || (i == n && table.n > 0)) {
      const int64_t blocks = ceil_div(tiles, tiles_per_block);
      const auto grid = static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
      const cudaError_t error = launch(kernel, grid, threads, 0, stream, table);
      if (error != cudaSuccess) return error;
      table.n = 0;
      tiles = 0;
    }
  }
  return cudaSuccess;
}

}  // namespace ppnet::cuda
