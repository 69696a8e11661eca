// What is kept of the tiles of one row, in memory that is used again.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace specdec {

// Per tile: its largest logit (greedy) or the base of its sum, its weight in a race, and when it arrives there; the
// weights of groups of tiles; and what a search for a cutoff looks at.
struct TileSpace {
  std::vector<float> level, weight, arrival, group, candidates;
  std::vector<int32_t> found;

  // The pass fills it; only what is behind the last tile is made empty here.
  void resize(int64_t tiles) {
    const auto padded = size_t((tiles + kRaceBlock - 1) / kRaceBlock * kRaceBlock);
    for (auto* tile : {&level, &weight, &arrival, &group}) tile->resize(padded);
    std::fill(level.begin() + tiles, level.end(), -INFINITY);
    std::fill(weight.begin() + tiles, weight.end(), 0.0f);
  }
};

// What a pass over some tiles found: whether all their weights are sums from the row's base; and a logit that was asked
// for, nan if it is not among them.
struct Found {
  bool shared = true;
  float logit = NAN;
};

}  // namespace specdec
