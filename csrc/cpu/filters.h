// Top-k, top-p and min-p without sorting a row: all three keep what is not below some logit, which is searched for
// (algorithms.md, 7). The weights of the tiles, known from the pass over the row, tell which tiles a search need not
// look at: no logit is larger than what alone would weigh as much as its tile.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include "kernels.h"
#include "source.h"
#include "tile_space.h"

namespace specdec {

struct Filters {
  int64_t top_k = 0;  // 0: off
  float top_p = 1.0f, min_p = 0.0f;

  bool any() const { return top_k > 0 || top_p < 1.0f || min_p > 0.0f; }
};

class CutoffSearch {
 public:
  // The weight of a tile: the sum of exp(scale * (logit - base)); `total`: their sum.
  CutoffSearch(const Kernels& kernels, const Source& source, float scale, float base, double total, int64_t tiles,
               TileSpace& space)
      : kernels_(kernels),
        source_(source),
        scale_(scale),
        base_(base),
        total_(total),
        weights_(space.weight.data()),
        tiles_(tiles),
        candidates_(space.candidates),
        found_(space.found) {
    candidates_.resize(size_t(tiles * kTile + kTileSlack));
    found_.resize(size_t(tiles));
  }

  // What the filters keep is what is not below this.
  float pivot(const Filters& filters) {
    const int64_t vocab = source_.row().vocab;
    float pivot = -INFINITY;
    double total = total_;
    bool collected = false;
    if (filters.top_k > 0 && filters.top_k < vocab) {
      collect(reached_by(filters.top_k));
      pivot = keep_largest(filters.top_k);
      collected = true;
    }
    if (filters.top_p < 1.0f) {
      if (collected) {
        total = mass_above(-INFINITY);
      } else {
        collect_mass(double(filters.top_p) * total, (1.0 - double(filters.top_p)) * total / double(vocab));
      }
      pivot = threshold_for_mass(double(filters.top_p) * total);
    }
    if (filters.min_p > 0.0f)
      pivot = std::max(pivot, float(double(largest()) + std::log(double(filters.min_p)) / double(scale_)));
    return pivot;
  }

  // The tiles that may hold a logit of at least x.
  std::span<const int32_t> tiles_reaching(float x) { return tiles_weighing(least_weight(x)); }

 private:
  // Below this a sort is quicker than another pass.
  static constexpr int64_t kFew = 128;

  // The least that a tile with a logit of at least x weighs.
  float least_weight(float x) const {
    // The two are rounded apart: leave room for that.
    return float(0.999 * std::exp(double(scale_) * (double(x) - double(base_))));
  }

  std::span<const int32_t> tiles_weighing(float least) {
    size_t found = 0;
    for (int64_t t = 0; t < tiles_; ++t) {
      found_[found] = int32_t(t);  // overwritten by the next one unless it counts
      found += !(weights_[t] < least);
    }
    return {found_.data(), found};
  }

  // The logits that are not below `low`, as the candidates.
  void collect(float low) {
    low = std::max(low, std::numeric_limits<float>::lowest());  // not what is masked out, nor what is past the end
    float buffer[kTile];
    count_ = 0;
    for (const int32_t t : tiles_reaching(low)) {
      const Source::At at = source_.at(t, buffer);
      count_ += kernels_.tile_between(at.row, low, INFINITY, at.tile, candidates_.data() + count_);
    }
  }

  // Candidates that hold the mass `goal`. All logits that alone weigh less than `tail` cannot hold what is left, so
  // these do not have to be among them; mostly a few larger ones do.
  void collect_mass(double goal, double tail) {
    constexpr double kHope = 16.0;
    const auto logit_of_weight = [&](double w) { return float(double(base_) + (std::log(w) - 0.01) / double(scale_)); };
    collect(logit_of_weight(kHope * tail));
    if (double(mass_above(-INFINITY)) < 1.0001 * goal) collect(logit_of_weight(tail));
  }

  // Of the candidates those in [low, high).
  void narrow(float low, float high) {
    int64_t kept = 0;
    for (int64_t t = 0; t * kTile < count_; ++t)
      kept += kernels_.tile_between(candidates(), low, high, t, candidates_.data() + kept);  // never past what is read
    count_ = kept;
  }

  // The mass of the candidates that are not below the pivot.
  float mass_above(float pivot) const {
    double mass = 0.0;
    for (int64_t t = 0; t * kTile < count_; ++t)
      mass += double(kernels_.tile_above(candidates(), scale_, base_, pivot, t).mass);
    return float(mass);
  }

  Row candidates() const { return {candidates_.data(), DType::f32, count_}; }

  // Of the candidates the `count` largest, ties with the last of them included; the smallest of these, or -inf where
  // there are not so many.
  float keep_largest(int64_t count) {
    if (count > count_) return -INFINITY;
    const auto first = candidates_.begin(), last = first + count_, nth = first + (count - 1);
    std::nth_element(first, nth, last, std::greater<float>());
    const float pivot = *nth;
    count_ = std::partition(nth, last, [&](float x) { return x == pivot; }) - first;
    return pivot;
  }

  // The largest candidate such that what is not below it has at least the mass `goal`.
  float threshold_for_mass(double goal) {
    double done = 0.0;  // the mass of what is not below `high`
    float low = -INFINITY, high = INFINITY;
    if (count_ > kFew) {
      low = *std::min_element(candidates_.begin(), candidates_.begin() + count_);
      high = std::nextafter(largest(), INFINITY);
    }
    for (int step = 0; count_ > kFew; ++step) {
      float middle = 0.5f * low + 0.5f * high;
      if (step >= 40 || !(low < middle && middle < high)) middle = by_order(low, high);
      if (!(low < middle && middle < high)) return low;  // all that is left is equal
      const double mass = double(mass_above(middle));
      if (done + mass >= goal) {
        low = middle;
        narrow(middle, high);
      } else {
        done += mass;
        high = middle;
        narrow(low, middle);
      }
    }
    const auto first = candidates_.begin(), last = first + count_;
    std::sort(first, last, std::greater<float>());
    for (auto logit = first; logit != last; ++logit) {
      done += std::exp(double(scale_) * (double(*logit) - double(base_)));
      if (done >= goal) return *logit;
    }
    return count_ > 0 ? *(last - 1) : low;
  }

  // The largest logit there is.
  float largest() {
    if (largest_ > -INFINITY) return largest_;
    const int64_t heaviest = std::max_element(weights_, weights_ + tiles_) - weights_;
    largest_ = peak(heaviest);
    for (const int32_t t : tiles_reaching(largest_)) largest_ = std::max(largest_, peak(t));
    return largest_;
  }

  float peak(int64_t tile) const {
    float buffer[kTile];
    const Source::At at = source_.at(tile, buffer);
    return kernels_.tile_peak(at.row, at.tile);
  }

  // A logit that at least `count` logits are not below, and not many more: the least of the largest logits of so many
  // of the heaviest tiles, or of up to a quarter more of them; -inf where there are fewer tiles.
  float reached_by(int64_t count) {
    if (count > tiles_) return -INFINITY;
    float light = 0.0f, heavy = float(total_);
    for (int step = 0; step < 32; ++step) {
      const float middle = by_order(light, heavy);
      if (!(light < middle && middle < heavy)) break;
      const int64_t reached = std::count_if(weights_, weights_ + tiles_, [&](float w) { return !(w < middle); });
      if (reached < count) {
        heavy = middle;
      } else {
        light = middle;
        if (reached <= count + count / 4) break;
      }
    }
    float low = INFINITY;
    for (const int32_t t : tiles_weighing(light)) low = std::min(low, peak(t));
    return low;
  }

  // The float halfway in the order of floats: about the geometric mean.
  static float by_order(float low, float high) {
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
  const float* weights_;
  const int64_t tiles_;
  std::vector<float>& candidates_;
  std::vector<int32_t>& found_;
  int64_t count_ = 0;  // of the candidates
  float largest_ = -INFINITY;
};

}  // namespace specdec
