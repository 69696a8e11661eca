// What is kept of the tiles of one row, in memory that is used again.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace specdec {

// Per tile: its largest logit (greedy) or the base of its sum, its weight in a race, and when it arrives there; what
// was found in each piece of the row; and what a search for a cutoff looks at.
struct TileSpace {
  struct alignas(64) Piece {
    Summed result;
  };

  std::vector<float> level, weight, arrival, candidates;
  std::vector<Piece> pieces;
  std::vector<int32_t> found;

  // The pass fills it; only what is behind the last tile is made empty here, once: it stays so.
  void resize(int64_t tiles) {
    if (tiles == tiles_) return;
    tiles_ = tiles;
    const auto padded = size_t((tiles + kRaceBlock - 1) / kRaceBlock * kRaceBlock);
    for (auto* tile : {&level, &weight, &arrival}) tile->resize(padded);
    std::fill(level.begin() + tiles, level.end(), -INFINITY);
    std::fill(weight.begin() + tiles, weight.end(), 0.0f);
  }

 private:
  int64_t tiles_ = -1;
};

}  // namespace specdec
