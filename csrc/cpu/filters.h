// Top-k, top-p and min-p without sorting a row: all three keep what is not below some logit, which is searched for
// (algorithms.md, 7). The largest logit of each tile tells which tiles a search need not look at.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"
#include "source.h"

namespace specdec {

struct Filters {
  int64_t top_k = 0;  // 0: off
  float top_p = 1.0f, min_p = 0.0f;

  bool any() const { return top_k > 0 || top_p < 1.0f || min_p > 0.0f; }
};

class CutoffSearch {
 public:
  // `peaks`: the largest logit of each tile, -inf past the end; `base` and `total` as the row's sum was taken.
  CutoffSearch(const Kernels& kernels, const Source& source, float scale, float base, double total, const float* peaks,
               int64_t tiles, std::vector<float>& candidates)
      : kernels_(kernels),
        source_(source),
        scale_(scale),
        base_(base),
        total_(total),
        peaks_(peaks),
        tiles_(tiles),
        largest_(*std::max_element(peaks, peaks + tiles)),
        candidates_(candidates) {}

  // What the filters keep is what is not below this.
  float pivot(const Filters& filters) {
    const int64_t vocab = source_.row().vocab;
    float pivot = -INFINITY;
    double total = total_;
    if (filters.top_k > 0 && filters.top_k < vocab) {
      pivot = largest_reaching<false>(double(filters.top_k), peak_reaching(filters.top_k));
      total = above(pivot).mass;
    }
    if (filters.top_p < 1.0f) {
      // All that is below this has less than 1 - top_p together, so the cutoff is not there.
      const double tail = (1.0 - double(filters.top_p)) * total / double(vocab);
      const float low = float(double(base_) + (std::log(tail) - 0.01) / double(scale_));
      pivot = largest_reaching<true>(double(filters.top_p) * total, std::max(pivot, low));
    }
    if (filters.min_p > 0.0f)
      pivot = std::max(pivot, float(double(largest_) + std::log(double(filters.min_p)) / double(scale_)));
    return pivot;
  }

 private:
  // More than this is narrowed down before it is sorted.
  static constexpr size_t kMostCandidates = 1024;

  struct Measure {
    int64_t count = 0;
    double mass = 0.0;
  };

  // What is not below the pivot.
  Measure above(float pivot) const {
    Measure sum;
    float buffer[kTile];
    for (int64_t t = 0; t < tiles_; ++t) {
      if (peaks_[t] < pivot) continue;
      const Source::At at = source_.at(t, buffer);
      const Above tile = kernels_.tile_above(at.row, scale_, base_, pivot, at.tile);
      sum.count += tile.count;
      sum.mass += double(tile.mass);
    }
    return sum;
  }

  // The largest logit such that what is not below it reaches the goal, in probability or in number. What is not below
  // `low` does, as far as the caller knows.
  template <bool kMass>
  float largest_reaching(double goal, float low) {
    float high = INFINITY;
    double done = 0.0;
    for (int step = 0; !collect(low, high); ++step) {
      const float middle = between(low, std::min(high, largest_), step);
      if (!(low < middle && middle < high)) return low;  // all that is left is equal
      const Measure measure = above(middle);
      const double reached = kMass ? measure.mass : double(measure.count);
      if (reached >= goal)
        low = middle;
      else
        high = middle, done = reached;
    }
    std::sort(candidates_.begin(), candidates_.end(), std::greater<float>());
    for (const float logit : candidates_) {
      done += kMass ? std::exp(double(scale_) * (double(logit) - double(base_))) : 1.0;
      if (done >= goal) return logit;
    }
    return candidates_.empty() ? low : candidates_.back();
  }

  // The logits in [low, high), if they are not too many.
  bool collect(float low, float high) {
    candidates_.clear();
    float logits[kTile], buffer[kTile];
    for (int64_t t = 0; t < tiles_; ++t) {
      if (peaks_[t] < low) continue;
      const Source::At at = source_.at(t, buffer);
      const int64_t count = kernels_.tile_between(at.row, low, high, at.tile, logits);
      candidates_.insert(candidates_.end(), logits, logits + count);
      if (candidates_.size() > kMostCandidates) return false;
    }
    return true;
  }

  // A logit that at least `count` tiles reach, and not many more; -inf where there are not so many tiles.
  float peak_reaching(int64_t count) const {
    if (count > tiles_) return -INFINITY;
    const auto reaching = [&](float x) {
      int32_t n = 0;
      for (int64_t t = 0; t < tiles_; ++t) n += peaks_[t] >= x;
      return int64_t(n);
    };
    float high = largest_, low = -INFINITY;
    for (int step = 0; step < 32; ++step) {
      const float middle = between(low, high, step);
      const int64_t reached = reaching(middle);
      if (reached < count) {
        high = middle;
      } else {
        low = middle;
        if (reached <= count + count / 4) break;
      }
      if (middle == -INFINITY) break;
    }
    return low;
  }

  // Between two logits, by value; as numbers of floats where that takes too long. Reaching down from above if `low` is
  // -inf, further with every step.
  float between(float low, float high, int step) const {
    if (low == -INFINITY) return high - std::ldexp(1.0f, step) / scale_;
    if (step < 40) return 0.5f * low + 0.5f * high;
    const auto order = [](float x) {
      const auto bits = std::bit_cast<int32_t>(x);
      return int64_t(bits < 0 ? int32_t(0x80000000u) - bits : bits);
    };
    const auto middle = int32_t((order(low) + order(high)) / 2);
    return std::bit_cast<float>(middle < 0 ? int32_t(0x80000000u) - middle : middle);
  }

  const Kernels& kernels_;
  const Source& source_;
  const float scale_, base_;
  const double total_;
  const float* peaks_;
  const int64_t tiles_;
  const float largest_;
  std::vector<float>& candidates_;
};

}  // namespace specdec
