// From the table of a row to its distribution (algorithms.md, 7), and draws from it.
#pragma once

#include "rows.h"

namespace specdec::cuda {

struct Sampling {
  float scale;  // inf: greedy
  int top_k;
  float top_p, min_p;

  SPECDEC_DEVICE bool greedy() const { return scale == INFINITY; }
  SPECDEC_DEVICE bool limits(int vocab) const { return top_k > 0 && top_k < vocab; }
  SPECDEC_DEVICE bool filters(int vocab) const { return limits(vocab) || top_p < 1.0f || min_p > 0.0f; }
  SPECDEC_DEVICE Measure measure(int vocab) const {
    return {greedy() ? 1.0f : scale * kLog2E, greedy() ? Sums::none : filters(vocab) ? Sums::with_tops : Sums::plain};
  }
};

SPECDEC_DEVICE Sampling sampling_of(const SamplingParameters& all, int request) {
  const SamplingParameters own = all.of(request);
  const int top_k = int(Smaller()(own.top_k, int64_t(std::numeric_limits<int>::max())));
  return {scale_of(own.temperature), top_k, own.top_p, own.min_p};
}

// What tokens are drawn from: [x >= cutoff] * exp(scale * (x - base) - log_total), or the point mass on `argmax` where
// that is one. The base of a row that was measured is its largest logit; of scalars that were handed over it is 0.
struct Distribution {
  float scale = 1.0f, cutoff = -INFINITY, base = 0.0f, log_total = 0.0f;
  int argmax = -1;

  // Whether it keeps some logits only, and not because the row is steep.
  SPECDEC_DEVICE bool filtered() const { return cutoff > -INFINITY && scale > 0.0f; }
  SPECDEC_DEVICE float logsumexp() const {
    return argmax >= 0 ? 0.0f : float(double(scale) * double(base) + double(log_total));
  }
  SPECDEC_DEVICE double log_prob(float x, int id) const {
    if (argmax >= 0) return id == argmax ? 0.0 : -INFINITY;
    return x < cutoff ? -INFINITY : double(scale) * (double(x) - double(base)) - double(log_total);
  }
};

// Probabilities of a distribution that is no point mass, divided by a factor.
class Probabilities {
 public:
  SPECDEC_DEVICE explicit Probabilities(const Distribution& d, double factor = 1.0) : cutoff_(d.cutoff) {
    const float total = factor == 1.0 ? d.log_total : float(double(d.log_total) + log(factor));
    if (d.base == 0.0f)  // the product and the sum are rounded once
      a_ = d.scale, b_ = -total, c_ = kLog2E, d_ = 0.0f;
    else
      a_ = 0.5f, b_ = -0.5f * d.base, c_ = 2.0f * d.scale * kLog2E, d_ = -total * kLog2E;
  }
  SPECDEC_DEVICE float cutoff() const { return cutoff_; }
  SPECDEC_DEVICE float operator()(float x) const { return x < cutoff_ ? 0.0f : ex2(fmaf(fmaf(x, a_, b_), c_, d_)); }

 private:
  float cutoff_, a_, b_, c_, d_;
};

// Of one token. Where that is hardly anything to a float32, or too much, float64 says how much.
SPECDEC_SELDOM double prob_of(const Distribution d, float x, int id) {
  if (d.argmax >= 0) return id == d.argmax ? 1.0 : 0.0;
  const float prob = Probabilities(d)(x);
  return prob > 1e-30f && prob < INFINITY ? double(prob) : exp(d.log_prob(x, id));
}

// A sum of weights relative to the largest logit among them.
struct Mass {
  float top = -INFINITY, sum = 0.0f;

  SPECDEC_DEVICE bool valid() const { return top > -INFINITY && top < INFINITY; }
};
class Together {
 public:
  SPECDEC_DEVICE explicit Together(float scale2) : scale2_(scale2) {}
  SPECDEC_DEVICE Mass operator()(const Mass& a, const Mass& b) const {
    const float top = LargerOrNan()(a.top, b.top);
    const Weights weight(scale2_, usable_base(top));
    return {top, a.sum * weight(a.top) + b.sum * weight(b.top)};
  }

 private:
  float scale2_;
};

// Of a row whose table is made. A warp's lanes read whole tables of spans: eight neighbouring sums and their base.
SPECDEC_DEVICE Mass mass_of(const Team& team, const Table& table, float scale2) {
  Mass all;
  SPECDEC_ROLLED
  for (int span = team.rank(); span < table.spans; span += kThreads) {
    Mass mass{fresh(table.base(span)), 0.0f};
    const Four low = fresh(table.four_sums(2 * span)), high = fresh(table.four_sums(2 * span + 1));
    SPECDEC_UNROLL
    for (int k = 0; k < 4; ++k) mass.sum += low.x[k] + high.x[k];
    all = Together(scale2)(all, mass);
  }
  return team.reduce(all, Together(scale2));
}

// The largest logit of a row whose table is made; nan if one is.
SPECDEC_DEVICE float top_of(const Team& team, const Table& table) {
  float top = -INFINITY;
  SPECDEC_ROLLED
  for (int span = team.rank(); span < table.spans; span += kThreads) top = LargerOrNan()(top, fresh(table.base(span)));
  return team.reduce(top, LargerOrNan());
}

// The first id that has it, which is in the first span that does.
template <class T>
SPECDEC_DEVICE int first_of(const Team& team, const Rows<T>& rows, int i, const Table& table, float top) {
  int found = kNobody;
  SPECDEC_ROLLED
  for (int span = team.rank(); span < table.spans && found == kNobody; span += kThreads)
    if (fresh(table.base(span)) == top) found = span;
  const int begin = team.reduce(found, Smaller()) * kSpan, end = Smaller()(begin + kSpan, rows.vocab);
  found = kNobody;
  SPECDEC_ROLLED
  for (int id = begin + team.rank(); id < end && found == kNobody; id += kThreads)
    if (rows.logit(i, id) == top) found = id;
  return team.reduce(found, Smaller());
}

// What a row that is not valid emits: the first of its largest finite logits, 0 where none is finite.
template <class T>
SPECDEC_SELDOM int largest_finite(const Team team, const Rows<T> rows, int i) {
  Arrived largest;
  for_ids(team, rows, i, [&](int id, float x) {
    if (x > -INFINITY && x < INFINITY) largest = Earlier()(largest, {-x, id});
  });
  largest = team.reduce(largest, Earlier());
  return largest.id == kNobody ? 0 : largest.id;
}

}  // namespace specdec::cuda

#include "filters.h"

namespace specdec::cuda {

// The distribution of row i, whose table is made, and whether the row is valid. Greedy is the point mass on the largest
// logit; so is, for what is emitted then, a row that is not valid, on its largest finite one.
template <class T>
SPECDEC_DEVICE bool distribution_of(const Team& team, const Rows<T>& rows, int i, const Sampling& sampling,
                                    const Table& table, Distribution& d) {
  d = {};
  if (sampling.greedy()) {
    const float top = top_of(team, table);
    const bool valid = top > -INFINITY && top < INFINITY;
    d.scale = INFINITY, d.cutoff = top;
    d.argmax = valid ? first_of(team, rows, i, table, top) : largest_finite(team, rows, i);
    return valid;
  }
  Mass mass = mass_of(team, table, sampling.scale * kLog2E);
  if (!mass.valid()) {
    d.argmax = largest_finite(team, rows, i);
    return false;
  }
  d.scale = sampling.scale, d.base = mass.top;
  if (is_steep(sampling.scale, mass.top)) {  // it weighs nothing but its largest logits (docs/noise.md)
    d.scale = 0.0f, d.cutoff = mass.top;
  } else if (sampling.filters(rows.vocab)) {
    const Kept kept = kept_by(team, rows, i, sampling, table, mass);
    d.cutoff = kept.cutoff, mass.sum = kept.mass;
  }
  d.log_total = logf(mass.sum);
  return true;
}

// The two-level race of weights that are nowhere above a row's probabilities, such as those themselves, or a residual.
// The row's own tiles, which are in its table, bound these: none can arrive before its bound does. So each warp looks
// at its tiles in the order of their bounds until none of the others can win: exact, and about 1 / (what is left of the
// probability) of them. `weigh(first, w)` gives the weights of four ids. kNobody where there is no weight.
template <class F>
SPECDEC_DEVICE int draw(const Team& team, const Probabilities& probability, bool filtered, const Table& table,
                        const Noise& noise, const F& weigh) {
  constexpr int kQuads = kTileIds / (4 * kLanes);
  const Noise inside{noise.seed, noise.position, noise.tag | kTokenRace << 8};
  const int tiles = table.spans * kTilesOfSpan;
  Four* const bounds = team.memory().bounds;  // each is read by the thread that writes it
  Arrived best;
  for (int begin = 0; begin < tiles; begin += 4 * kBounds) {
    SPECDEC_ROLLED
    for (int quad = team.rank(); quad < kBounds; quad += kThreads) {
      const int first = begin + 4 * quad;
      const bool there = first < tiles;
      const Words words = philox(noise, uint32_t(first / 4));
      const float share = there ? probability(fresh(table.base(first / kTilesOfSpan))) : 0.0f;
      const Four sums = there ? fresh(table.four_sums(first / 4)) : Four{};
      const Four tops = there && filtered ? fresh(table.four_tops(first / 4)) : Four{};
      Four bound;
      SPECDEC_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float weight = filtered && tops.x[k] < probability.cutoff() ? 0.0f : sums.x[k] * share;
        bound.x[k] = weight > 0.0f ? quotient(exponential(words.w[k]), weight) : INFINITY;
      }
      bounds[quad] = bound;
    }
    for (;;) {
      Arrived next;
      SPECDEC_ROLLED
      for (int quad = team.rank(); quad < kBounds; quad += kThreads) {
        const Four bound = bounds[quad];
        SPECDEC_UNROLL
        for (int k = 0; k < 4; ++k)
          if (bound.x[k] < next.time) next = {bound.x[k], begin + 4 * quad + k};
      }
      const int mine = next.id;
      next = team.first_in_warp(next);
      // The bounds and the weights are rounded apart: leave room for that.
      const bool may_win = next.time * 0.9999f < best.time;
      if (!team.any(may_win)) break;
      Arrived here;
      if (may_win) {
        if (next.id == mine) bounds[(mine - begin) / 4].x[mine % 4] = INFINITY;
        const float weight = fresh(table.sum(next.id)) * probability(fresh(table.base(next.id / kTilesOfSpan)));
        float w[4 * kQuads], sum = 0.0f;
        SPECDEC_UNROLL
        for (int q = 0; q < kQuads; ++q) {
          weigh(next.id * kTileIds + 4 * (q * kLanes + team.lane()), w + 4 * q);
          SPECDEC_UNROLL
          for (int k = 0; k < 4; ++k) sum += w[4 * q + k];
        }
        sum = team.in_warp(sum, Plus());
        if (sum > 0.0f) {
          SPECDEC_UNROLL
          for (int q = 0; q < kQuads; ++q) {
            const int quad = q * kLanes + team.lane();
            const Words words = philox(inside, uint32_t(quad));
            SPECDEC_UNROLL
            for (int k = 0; k < 4; ++k)
              take_part(here, exponential(words.w[k]), w[4 * q + k], next.id * kTileIds + 4 * quad + k);
          }
          here = team.first_in_warp(here);
          here.time = quotient(next.time * weight, sum);
        }
      }
      best = Earlier()(best, team.reduce(here, Earlier()));
    }
  }
  return best.id;
}

// A draw from the row itself.
template <class T>
SPECDEC_DEVICE int draw_from_row(const Team& team, const Rows<T>& rows, int i, const Distribution& d,
                                 const Table& table, const Noise& noise) {
  const Probabilities probability(d);
  return draw(team, probability, d.filtered(), table, noise, [&](int first, float* w) {
    SPECDEC_UNROLL
    for (int k = 0; k < 4; ++k) w[k] = first + k < rows.vocab ? probability(rows.logit(i, first + k)) : 0.0f;
  });
}

// The winner of the race of all ids of a row that was measured with it. Where filters keep some only, those race anew.
template <class T>
SPECDEC_DEVICE int flat_race(const Team& team, const Rows<T>& rows, int i, const Distribution& d, const Table& table,
                             const Noise& noise) {
  const Probabilities probability(d);
  Arrived first;
  SPECDEC_ROLLED
  for (int span = team.rank(); !d.filtered() && span < table.spans; span += kThreads) {
    const float share = probability(fresh(table.base(span)));
    const float time = quotient(fresh(table.time(span)), share);
    if (share > 0.0f && time < INFINITY) first = Earlier()(first, {time, bits_of(fresh(table.winner(span)))});
  }
  for (int span = team.warp(); d.filtered() && span < table.spans; span += kWarps) {
    if (fresh(table.base(span)) < d.cutoff) continue;
    SPECDEC_ROLLED
    for (int u = 0; u < kLoads; ++u) {
      const int id = span * kSpan + load_offset(team, u);
      race(team, rows.load(i, id), id, probability, noise, first);
    }
  }
  return team.reduce(first, Earlier()).id;
}

}  // namespace specdec::cuda
