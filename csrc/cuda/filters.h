// What top-k, then top-p, then min-p keep of a row, without sorting it, and hardly ever by going over it again: the
// largest logits of the tiles are in the table, and only the few tiles whose largest is not below the k-th largest of
// them can hold what top-k keeps. Those logits are gathered, and each counts what is above it.
#pragma once

#include "distribution.h"

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
// The upper one of the middle; low < high.
SPECDEC_DEVICE int middle_of(int low, int high) {
  return int(unsigned(low) + (unsigned(high) - unsigned(low) + 1) / 2);
}

// Of the finite logits of a row that are not below a pivot: how many, the sum of their weights, the smallest; and the
// largest one below.
struct Above {
  int count = 0;
  float mass = 0.0f, least = INFINITY, below = -INFINITY;
};
struct BothAbove {
  SPECDEC_DEVICE Above operator()(const Above& a, const Above& b) const {
    return {a.count + b.count, a.mass + b.mass, fminf(a.least, b.least), fmaxf(a.below, b.below)};
  }
};

template <class T>
SPECDEC_SELDOM Above all_above(const Team team, const Rows<T> rows, int i, const Table table, const Weights weight,
                               float pivot) {
  Above own;
  for (int span = team.warp(); span < table.spans; span += kWarps) {
    const float top = fresh(table.base(span));
    if (top < pivot) {  // nothing to look at
      own.below = fmaxf(own.below, top);
      continue;
    }
    for (int u = 0; u < kLoads; ++u) {
      const auto v = rows.load(i, span * kSpan + load_offset(team, u));
      SPECDEC_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const float x = v.at(e);
        const bool in = x >= pivot && x > -INFINITY;
        own.count += in;
        own.mass += in ? weight(x) : 0.0f;
        own.least = fminf(own.least, in ? x : INFINITY);
        own.below = fmaxf(own.below, in ? -INFINITY : x);
      }
    }
  }
  return team.reduce(own, BothAbove());
}

template <class T>
class Filter {
 public:
  SPECDEC_DEVICE Filter(const Team& team, const Rows<T>& rows, int i, const Sampling& sampling, const Table& table,
                        const Mass& all)
      : team_(team),
        memory_(team.memory().found),
        rows_(rows),
        i_(i),
        sampling_(sampling),
        table_(table),
        all_(all),
        tiles_(table.spans * kTilesOfSpan),
        weight_(sampling.scale * kLog2E, all.top),
        floor_(sampling.min_p > 0.0f ? all.top + logf(sampling.min_p) / sampling.scale : -INFINITY) {}

  SPECDEC_DEVICE Kept kept() const {
    const bool limited = sampling_.limits(rows_.vocab), by_mass = sampling_.top_p < 1.0f;
    float pivot = limited && sampling_.top_k <= tiles_ ? some_tops(sampling_.top_k) : -INFINITY;
    const float goal = limited ? 0.0f : sampling_.top_p * all_.sum;
    SPECDEC_ROLLED
    for (float gap = 4.0f; limited ? pivot > -INFINITY : by_mass && gap < 80.0f; gap *= 2.0f) {
      const float lowest = -std::numeric_limits<float>::max();
      const int count = gather(limited ? pivot : fmaxf(all_.top - gap / sampling_.scale, lowest));
      if (count > kKept) break;
      if (limited || gathered_mass(count) >= goal) return ranked(count, limited, goal);
    }
    // By going over the row: min-p alone, or what keeps more than a block has memory for.
    if (limited) pivot = largest_reaching(false, float(sampling_.top_k), pivot);
    if (by_mass) pivot = largest_reaching(true, sampling_.top_p * (limited ? above(pivot).mass : all_.sum), pivot);
    pivot = fmaxf(pivot, floor_);
    const Above found = above(pivot);
    return {pivot == -INFINITY && found.count < rows_.vocab ? -INFINITY : found.least, found.mass};
  }

 private:
  // A value that at least k tiles reach with their largest logit, so that at least k logits do, and hardly more tiles
  // than the k; -inf where fewer have a finite one.
  SPECDEC_DEVICE float some_tops(int k) const {
    constexpr int kCached = 8;
    float own[kCached];
    SPECDEC_UNROLL
    for (int c = 0; c < kCached; ++c) {
      const int tile = c * kThreads + team_.rank();
      own[c] = tile < tiles_ ? fresh(table_.top(tile)) : -INFINITY;
    }
    int low = order_of(-INFINITY), high = order_of(all_.top);
    while (low < high) {
      const int middle = middle_of(low, high);
      const float value = float_in_order(middle);
      int count = 0;
      SPECDEC_UNROLL
      for (const float top : own) count += top >= value;
      SPECDEC_ROLLED
      for (int tile = kCached * kThreads + team_.rank(); tile < tiles_; tile += kThreads)
        count += fresh(table_.top(tile)) >= value;
      count = team_.reduce(count, Plus());
      if (count >= k)
        low = middle;
      else
        high = middle - 1;
      if (count >= k && count <= k + kSlack) break;
    }
    return float_in_order(low);
  }
  static constexpr int kSlack = 14;  // of top-k 50, 64 tiles: what a block loads at a time

  // The logits that are not below a pivot into the block's memory, with their weights, in an order that does not depend
  // on the launch. How many; more than kKept where they are too many.
  SPECDEC_DEVICE int gather(float pivot) const {
    int listed = 0;
    SPECDEC_ROLLED
    for (int first = 0; first < tiles_; first += kThreads) {
      const int tile = first + team_.rank();
      const bool may = tile < tiles_ && fresh(table_.top(tile)) >= pivot;
      int more;
      const int at = listed + team_.before(may, more);
      if (may && at < kListed) memory_.list[at] = tile;
      listed += more;
    }
    team_.sync();
    if (listed > kListed) return kKept + 1;
    int count = 0;
    for (int first = 0; first < listed; first += kWarps * kTilesOfSpan) {
      // Where the u-th load of this lane begins.
      const auto id_of = [&](int u) {
        const int offset = load_offset(team_, u), entry = first + team_.warp() * kTilesOfSpan + offset / kTileIds;
        return entry < listed ? memory_.list[entry] * kTileIds + offset % kTileIds : rows_.vocab;
      };
      constexpr int kWords = kLoads * kElements / 32;
      uint32_t found[kWords] = {};  // a bit for each logit
      int own = 0, more;
      SPECDEC_UNROLL
      for (int u = 0; u < kLoads; ++u) {
        const auto v = rows_.load(i_, id_of(u));
        SPECDEC_UNROLL
        for (int e = 0; e < kElements; ++e) found[u / 4] |= uint32_t(v.at(e) >= pivot) << (u % 4 * kElements + e);
      }
      SPECDEC_UNROLL
      for (const uint32_t word : found) own += count_bits(word);
      int at = count + team_.before(own, more);
      SPECDEC_UNROLL
      for (int word = 0; word < kWords; ++word) {
        SPECDEC_ROLLED
        for (uint32_t bits = found[word]; bits != 0; bits &= bits - 1, ++at) {
          const int bit = first_bit(bits);  // few are found: they are loaded again, and not all kept meanwhile
          if (at < kKept) memory_.values[at] = rows_.logit(i_, id_of(4 * word + bit / kElements) + bit % kElements);
        }
      }
      count += more;
    }
    team_.sync();
    SPECDEC_ROLLED
    for (int j = team_.rank(); j < count && j < kKept; j += kThreads) memory_.weights[j] = weight_(memory_.values[j]);
    team_.sync();
    return count;
  }

  SPECDEC_DEVICE float gathered_mass(int count) const {
    float mass = 0.0f;
    SPECDEC_ROLLED
    for (int j = team_.rank(); j < count; j += kThreads) mass += memory_.weights[j];
    return team_.reduce(mass, Plus());
  }

  // What is kept of the logits that were gathered. Top-k keeps those with fewer than k above, top-p those with less
  // mass above than `goal`, or than its share of what top-k left: equal logits stay or go together.
  SPECDEC_DEVICE Kept ranked(int count, bool limited, float goal) const {
    float left = 0.0f;
    team_.sync();  // the list has been read
    for (int j = team_.rank(); j < count; j += kThreads) {
      const float value = memory_.values[j];
      int larger = 0;
      float mass = 0.0f;
      for (int other = 0; other < count; ++other)
        if (memory_.values[other] > value) ++larger, mass += memory_.weights[other];
      const bool kept = !limited || larger < sampling_.top_k;
      if (kept) left += memory_.weights[j];
      memory_.list[j] = bits_of(kept ? mass : INFINITY);  // only this thread reads it
    }
    if (limited) goal = sampling_.top_p * team_.reduce(left, Plus());
    Above all;
    for (int j = team_.rank(); j < count; j += kThreads) {
      const float value = memory_.values[j], mass = float_of_bits(memory_.list[j]);
      if (mass < INFINITY && (sampling_.top_p >= 1.0f || mass < goal || mass == 0.0f) && value >= floor_)
        all = BothAbove()(all, {1, memory_.weights[j], value, -INFINITY});
    }
    all = team_.reduce(all, BothAbove());
    return {all.least, all.mass};
  }

  SPECDEC_DEVICE Above above(float pivot) const { return all_above<T>(team_, rows_, i_, table_, weight_, pivot); }

  // The largest logit such that what is not below it reaches `goal`, in mass or in number; what is not below `low`
  // does. Bisection by value; both ends move on to the next logit there is.
  SPECDEC_DEVICE float largest_reaching(bool by_mass, float goal, float low_value) const {
    int low = order_of(low_value), high = order_of(all_.top);
    while (low < high) {
      const Above found = above(float_in_order(middle_of(low, high)));
      if ((by_mass ? found.mass : float(found.count)) >= goal)
        low = order_of(found.least);
      else
        high = Larger()(order_of(found.below), low);
    }
    return float_in_order(low);
  }

  const Team& team_;
  decltype(BlockMemory::found)& memory_;
  const Rows<T>& rows_;
  const int i_;
  const Sampling& sampling_;
  const Table& table_;
  const Mass& all_;
  const int tiles_;
  const Weights weight_;
  const float floor_;
};

template <class T>
SPECDEC_SELDOM Kept kept_by(const Team team, const Rows<T> rows, int i, const Sampling sampling, const Table table,
                            const Mass all) {
  return Filter<T>(team, rows, i, sampling, table, all).kept();
}

}  // namespace specdec::cuda
