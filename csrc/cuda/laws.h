// The law of a row: temperature, top-k, top-p and min-p (algorithms.md, 7), all found without sorting.
#pragma once

#include "rows.h"

namespace specdec::cuda {

struct Sampling {
  float scale;  // inf: greedy
  int64_t top_k;
  float top_p, min_p;

  SPECDEC_DEVICE bool greedy() const { return scale == INFINITY; }
  // What a row is measured with: greedily only its largest logit is asked for.
  SPECDEC_DEVICE float finite_scale() const { return greedy() ? 1.0f : scale; }
};

SPECDEC_DEVICE Sampling sampling_of(const SamplingParameters& all, int64_t request) {
  const SamplingParameters own = all.of(request);
  return {scale_of(own.temperature), own.top_k, own.top_p, own.min_p};
}

// Of the finite logits of a row that are not below a pivot: how many, the sum of exp(scale * (logit - top)), the
// smallest; and the largest one below.
struct Above {
  int64_t count;
  double mass;
  float least, below;
};

// A search for what the filters keep, in a valid row whose table holds all of it.
template <bool P>
class CutoffSearch {
 public:
  SPECDEC_DEVICE CutoffSearch(const Team& team, const Rows& rows, int64_t i, const Table& table, float scale, float top)
      : team_(team), rows_(rows), i_(i), table_(table), scale_(scale), top_(top) {}

  // What top-k, then top-p, then min-p keep is what is not below this.
  SPECDEC_DEVICE float pivot(const Sampling& sampling) const {
    float pivot = -INFINITY;
    if (sampling.top_k > 0 && sampling.top_k < rows_.vocab)
      pivot = largest_reaching<false>(double(sampling.top_k), pivot);
    if (sampling.top_p < 1.0f) pivot = largest_reaching<true>(double(sampling.top_p) * above(pivot).mass, pivot);
    if (sampling.min_p > 0.0f) pivot = fmaxf(pivot, top_ + logf(sampling.min_p) / scale_);
    return pivot;
  }

 private:
  SPECDEC_PASS Above above(float pivot) const {
    int64_t count = 0;
    double mass = 0.0;
    float least = INFINITY, below = -INFINITY;
    for_tiles<P ? 1 : kAhead>(team_, 0, tiles_of(rows_.vocab), [&](int64_t tile, bool there) {
      if (!there) return;
      const float largest = fresh(table_.maxima + tile);
      if (largest < pivot) {  // nothing to look at
        below = fmaxf(below, largest);
        return;
      }
      float x[kElements], sum = 0.0f;
      load<P>(rows_, i_, own_ids(team_, tile), x);
      SPECDEC_UNROLL
      for (const float value : x) {
        if (value >= pivot && value > -INFINITY) {
          ++count;
          sum += expf(gap(scale_, value, top_));
          least = fminf(least, value);
        } else {
          below = fmaxf(below, value);
        }
      }
      mass += double(sum);
    });
    return {team_.reduce(count, Plus()), team_.reduce(mass, Plus()), team_.reduce(least, Smaller()),
            team_.reduce(below, Larger())};
  }

  // The largest logit such that what is not below it reaches `goal`, in probability or in number; what is not below
  // `low` does. Bisection by value; both ends move on to the next logit there is, so it ends with the answer.
  template <bool kByMass>
  SPECDEC_DEVICE float largest_reaching(double goal, float low) const {
    float high = top_, reach = 1.0f / scale_;  // the largest logit that may be the answer
    while (low < high) {
      float middle = 0.5f * low + 0.5f * high;
      if (low == -INFINITY) {
        middle = fmaxf(high - reach, -std::numeric_limits<float>::max());  // the least there is
        reach *= 2.0f;
      }
      if (!(middle > low)) middle = high;
      const Above found = above(middle);
      const double reached = kByMass ? found.mass : double(found.count);
      if (reached >= goal) {
        low = found.least;
        if (!kByMass && reached == goal) high = found.least;
      } else {
        high = fmaxf(found.below, low);
      }
    }
    return low;
  }

  const Team& team_;
  const Rows& rows_;
  const int64_t i_;
  const Table& table_;
  const float scale_, top_;
};

struct LawOfRow {
  Law law;
  bool valid;
};

// From the table of row i; where tokens are filtered out, the row is measured again. Greedy is the point mass on the
// largest logit; so is, for what is emitted then, a row that is not valid, on its largest finite one.
template <bool P>
SPECDEC_DEVICE LawOfRow law_of(const Team& team, const Rows& rows, int64_t i, const Sampling& sampling,
                               const Table& table, const Noise& noise, bool race) {
  Summary found = summary(team, rows, sampling.finite_scale(), table, noise, race);
  const bool valid = found.valid;
  if (sampling.greedy() || !valid)
    return {{sampling.scale, found.top, 0.0, largest_token<P>(team, rows, i, found.top, found.largest), 0}, valid};
  float cutoff = -INFINITY;
  const bool filters =
      (sampling.top_k > 0 && sampling.top_k < rows.vocab) || sampling.top_p < 1.0f || sampling.min_p > 0.0f;
  if (filters && !is_steep(sampling.scale, found.top)) {
    const float pivot = CutoffSearch<P>(team, rows, i, table, sampling.scale, found.top).pivot(sampling);
    cutoff = tabulate<P>(team, rows, i, 0, tiles_of(rows.vocab), sampling.scale, pivot, table);
    cutoff = team.reduce(cutoff, Smaller());  // all have written
    found = summary(team, rows, sampling.scale, table, noise, race);
  }
  return {law_from(found, sampling.scale, cutoff), valid};
}

}  // namespace specdec::cuda
