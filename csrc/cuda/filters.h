// What top-k, then top-p, then min-p keep of a row, without sorting it, and hardly ever by going over it again: the
// largest logits of the tiles are in the table, and only the few tiles whose largest is not below the k-th largest of
// them can hold what top-k keeps. Those logits are gathered, and each counts what is above it.
#pragma once

#include <numeric>

#include "rows.h"

namespace specdec::cuda {

// The smallest logit that is kept, and the sum of the weights of all that are, relative to the row's largest logit.
struct Kept {
  float cutoff, mass;
};

// Floats as integers in the same order, both zeros as one.
SPECDEC_DEVICE int order_of(float x) {
  const int bits = bits_of(x == 0.0f ? 0.0f : x);
  return bits ^ (bits >> 31 & 0x7FFFFFFF);
}
SPECDEC_DEVICE float float_in_order(int order) { return float_of_bits(order ^ (order >> 31 & 0x7FFFFFFF)); }

// Of finite logits that are not below a pivot: the sum of their weights, the smallest; and the largest one below.
struct Above {
  float mass = 0.0f, least = INFINITY, below = -INFINITY;

  SPECDEC_DEVICE Above operator+(const Above& other) const {
    return {mass + other.mass, fminf(least, other.least), fmaxf(below, other.below)};
  }
};
SPECDEC_DEVICE Above above(float x, float weight, float pivot) {
  return x >= pivot && x > -INFINITY ? Above{.mass = weight, .least = x} : Above{.below = x};
}

// Over the whole row. `counts`: each logit weighs one.
template <class T>
SPECDEC_SELDOM Above all_above(const Row<T> row, bool counts, float pivot) {
  const Weights weight = counts ? Weights{0.0f, 0.0f} : Weights{row.sampling().scale2(), block::memory().top};
  Above own;
  for (int span = block::warp(); span < row.table().spans; span += kWarps) {
    const float top = load_l2(row.table().base(span));
    if (top < pivot) {  // nothing to find
      own.below = fmaxf(own.below, top);
      continue;
    }
    for (int u = 0; u < kLoads; ++u) {
      const auto v = row.load(span * kSpan + load_offset(u));
      SPECDEC_UNROLL
      for (int e = 0; e < kElements; ++e) own = own + above(v.at(e), weight(v.at(e)), pivot);
    }
  }
  return block::reduce(own, std::plus<>());
}

// The largest value such that what is not below it has `goal` in mass, or one with hardly more than that; what is not
// below `low_value` does. Bisection by value; both ends move on to the next one there is.
template <class F>
SPECDEC_DEVICE float threshold_for_mass(float goal, float slack, float low_value, float high_value,
                                        const F& all_above) {
  int low = order_of(low_value), high = order_of(high_value);
  while (low < high) {
    const Above found = all_above(float_in_order(std::midpoint(high, low)));
    if (found.mass >= goal)
      low = order_of(found.least);
    else
      high = std::max(order_of(found.below), low);
    if (found.mass >= goal && found.mass < goal + slack) break;
  }
  return float_in_order(low);
}

template <class T>
struct Filter {
  const Row<T>& row;
  const Sampling& sampling;

  SPECDEC_DEVICE Kept kept() const {
    float pivot = limited() && sampling.top_k <= tiles() ? some_tops(sampling.top_k) : -INFINITY;
    SPECDEC_ROLLED
    // Doubled, which is exact. NOLINTNEXTLINE(bugprone-float-loop-counter)
    for (float gap = 4.0f; limited() ? pivot > -INFINITY : by_mass() && gap < 80.0f; gap *= 2.0f) {
      const float lowest = -std::numeric_limits<float>::max();
      float mass;
      const int count = gather(limited() ? pivot : fmaxf(top() - gap / sampling.scale, lowest), mass);
      if (count > kKept) break;
      if (limited() || mass >= goal()) return ranked(count);
    }
    // By going over the row: min-p alone, or what keeps more than a block has memory for.
    const auto threshold = [&](float goal, bool counts) {
      return threshold_for_mass(goal, 0.0f, pivot, top(), [&](float least) { return all_above(row, counts, least); });
    };
    if (limited()) pivot = threshold(float(sampling.top_k), true);
    if (by_mass()) pivot = threshold(limited() ? sampling.top_p * all_above(row, false, pivot).mass : goal(), false);
    pivot = fmaxf(pivot, floor());
    const Above found = all_above(row, false, pivot);
    const bool keeps_all = pivot == -INFINITY && all_above(row, true, pivot).mass < float(row.vocab());
    return {keeps_all ? -INFINITY : found.least, found.mass};
  }

 private:
  // Read again each time, or registers would hold them while the row is gone over.
  SPECDEC_DEVICE bool limited() const { return sampling.limits(row.vocab()); }
  SPECDEC_DEVICE bool by_mass() const { return sampling.top_p < 1.0f; }
  SPECDEC_DEVICE float top() const { return block::memory().top; }
  SPECDEC_DEVICE float goal() const { return sampling.top_p * block::memory().sum; }
  SPECDEC_DEVICE int tiles() const { return row.table().spans * kTilesOfSpan; }
  SPECDEC_DEVICE decltype(BlockMemory::found)& memory() const { return block::memory().found; }
  // What min-p keeps.
  SPECDEC_DEVICE float floor() const {
    return sampling.min_p > 0.0f ? top() + logf(sampling.min_p) / sampling.scale : -INFINITY;
  }

  // A value such that at least k tiles have a largest logit not below it, so that at least k logits are not, and hardly
  // more tiles than the k; -inf where fewer have a finite one.
  SPECDEC_DEVICE float some_tops(int k) const {
    constexpr int kCached = 8;
    float own[kCached];
    SPECDEC_UNROLL
    for (int c = 0; c < kCached; ++c) {
      const int tile = c * kThreads + block::rank();
      own[c] = tile < tiles() ? load_l2(row.table().top(tile)) : -INFINITY;
    }
    constexpr float kSlack = 15.0f;  // of top-k 50, 64 tiles: what a block loads at a time
    return threshold_for_mass(float(k), kSlack, -INFINITY, top(), [&](float pivot) {
      Above found;
      SPECDEC_UNROLL
      for (const float top : own) found = found + above(top, 1.0f, pivot);
      SPECDEC_ROLLED
      for (int tile = kCached * kThreads + block::rank(); tile < tiles(); tile += kThreads)
        found = found + above(load_l2(row.table().top(tile)), 1.0f, pivot);
      return block::reduce(found, std::plus<>());
    });
  }

  // The logits that are not below a pivot into the block's memory, with their weights, in an order that does not depend
  // on the launch. How many, more than kKept where they are too many; and their mass.
  SPECDEC_DEVICE int gather(float pivot, float& mass) const {
    const Weights weight{sampling.scale2(), top()};
    int listed = 0, count = 0, more;
    mass = 0.0f;
    SPECDEC_ROLLED
    for (int first = 0; first < tiles(); first += kThreads, listed += more) {
      const int tile = first + block::rank();
      const bool may = tile < tiles() && load_l2(row.table().top(tile)) >= pivot;
      const int at = listed + block::before(may, more);
      if (may && at < kListed) memory().list[at] = tile;
    }
    block::sync();
    if (listed > kListed) return kKept + 1;
    for (int first = 0; first < listed; first += kWarps * kTilesOfSpan, count += more) {
      const auto for_found = [&](const auto& f) {
        SPECDEC_ROLLED
        for (int u = 0; u < kLoads; ++u) {
          const int offset = load_offset(u), entry = first + block::warp() * kTilesOfSpan + offset / kTileIds;
          if (entry >= listed) continue;
          const auto v = row.load(memory().list[entry] * kTileIds + offset % kTileIds);
          SPECDEC_UNROLL
          for (int e = 0; e < kElements; ++e)
            if (v.at(e) >= pivot) f(v.at(e));
        }
      };
      int own = 0;
      for_found([&](float) { ++own; });
      int at = count + block::before(own, more);
      for_found([&](float x) {  // they are loaded again, and not all kept meanwhile
        const float own_weight = weight(x);
        if (at < kKept) memory().values[at] = x, memory().weights[at] = own_weight;
        ++at, mass += own_weight;
      });
    }
    mass = block::reduce(mass, std::plus<>());  // and all see what was gathered
    return count;
  }

  // What is kept of the logits that were gathered. Top-k keeps those with fewer than k above, top-p those with less
  // mass above than its share of the row's, or of what top-k left: equal logits stay or go together.
  SPECDEC_DEVICE Kept ranked(int count) const {
    float left = 0.0f;
    block::sync();  // the list has been read
    for (int j = block::rank(); j < count; j += kThreads) {
      const float value = memory().values[j];
      int larger = 0;
      float mass = 0.0f;
      for (int other = 0; other < count; ++other)
        if (memory().values[other] > value) ++larger, mass += memory().weights[other];
      const bool kept = !limited() || larger < sampling.top_k;
      if (kept) left += memory().weights[j];
      memory().list[j] = bits_of(kept ? mass : INFINITY);  // only this thread reads it
    }
    const float most = limited() ? sampling.top_p * block::reduce(left, std::plus<>()) : goal();
    Above found;
    for (int j = block::rank(); j < count; j += kThreads) {
      const float value = memory().values[j], mass = float_of_bits(memory().list[j]);
      if (mass < INFINITY && (sampling.top_p >= 1.0f || mass < most || mass == 0.0f) && value >= floor())
        found = found + above(value, memory().weights[j], value);
    }
    found = block::reduce(found, std::plus<>());
    return {found.least, found.mass};
  }
};

template <class T>
SPECDEC_SELDOM Kept kept_by(const Row<T> row) {
  return Filter<T>{row, row.sampling()}.kept();
}

}  // namespace specdec::cuda
