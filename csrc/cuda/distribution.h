// From the table of a row to its distribution (algorithms.md, 7), and draws from it.
#pragma once

#include "filters.h"

namespace specdec::cuda {

// What tokens are drawn from: [x >= cutoff] * exp(scale * (x - base) - log_total), or the point mass on `argmax` where
// that is one. The base of a row that was measured is its largest logit; of scalars that were handed over it is 0.
struct alignas(16) Distribution {
  float scale = 1.0f, cutoff = -INFINITY, base = 0.0f, log_total = 0.0f;
  int argmax = -1;
  bool valid = true;

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
struct Probabilities {
  float cutoff, a, b, c, d;

  SPECDEC_DEVICE float operator()(float x) const { return x < cutoff ? 0.0f : ex2(fmaf(fmaf(x, a, b), c, d)); }
};
SPECDEC_DEVICE Probabilities probabilities_of(const Distribution& d, double factor = 1.0) {
  const float total = factor == 1.0 ? d.log_total : float(double(d.log_total) + log(factor));
  if (d.base == 0.0f) return {d.cutoff, d.scale, -total, kLog2E, 0.0f};  // the product and the sum are rounded once
  return {d.cutoff, 0.5f, -0.5f * d.base, 2.0f * d.scale * kLog2E, -total * kLog2E};
}

// Of one token. Where that is hardly anything to a float32, or too much, float64 says how much.
SPECDEC_SELDOM double prob_of(const Distribution d, float x, int id) {
  if (d.argmax >= 0) return id == d.argmax ? 1.0 : 0.0;
  const float prob = probabilities_of(d)(x);
  return prob > 1e-30f && prob < INFINITY ? double(prob) : exp(d.log_prob(x, id));
}

// Of a row whose table is made. A warp's lanes read whole tables of spans: eight neighbouring sums and their base.
template <class T>
SPECDEC_DEVICE Mass mass_of(const Row<T>& row) {
  const auto together = [scale2 = row.sampling().scale2()](const Mass& a, const Mass& b) {
    const Weights weight{scale2, LargerOrNan()(a.top, b.top)};
    return Mass{weight.base, a.sum * weight(a.top) + b.sum * weight(b.top)};
  };
  Mass all;
  SPECDEC_ROLLED
  for (int span = block::rank(); span < row.table().spans; span += kThreads) {
    Mass mass{load_l2(row.table().base(span)), 0.0f};
    const Four low = load_l2(row.table().four_sums(2 * span)), high = load_l2(row.table().four_sums(2 * span + 1));
    SPECDEC_UNROLL
    for (int k = 0; k < 4; ++k) mass.sum += low.x[k] + high.x[k];
    all = together(all, mass);
  }
  return block::reduce(all, together);
}

// The log-probability of a token of a row that is measured anew.
template <class T>
SPECDEC_SELDOM float logprob_anew(const Row<T> row, int id) {
  measure_anew(row);
  const Mass mass = mass_of(row);
  return mass.valid() ? (row.logit(id) - mass.top) - logf(mass.sum) : NAN;
}

// The first of the largest finite logits among some ids of a row; 0 where none is finite.
template <class T>
SPECDEC_SELDOM int largest_finite(const Row<T> row, int begin, int end) {
  Arrived largest;
  row.for_ids(begin, end, [&](int id, float x) {
    if (x > -INFINITY && x < INFINITY) largest = Earlier()(largest, {-x, id});
  });
  largest = block::reduce(largest, Earlier());
  return largest.id == kNobody ? 0 : largest.id;
}

// The distribution of a row whose table is made, in the block's memory. Greedy is the point mass on the largest logit;
// so is, for what is drawn then, a row that is not valid, on its largest finite one.
template <class T>
SPECDEC_DEVICE void find_distribution(const Row<T>& row, Distribution& d) {
  const Sampling& sampling = row.sampling();  // as all else read again behind calls
  const Mass mass = mass_of(row);
  block::by_one([&] {
    block::memory().top = mass.top, block::memory().sum = mass.sum;
    d = {.scale = sampling.scale, .base = mass.top, .log_total = logf(mass.sum), .valid = mass.valid()};
  });
  if (sampling.greedy() || !d.valid) {
    int begin = 0, end = row.vocab();
    if (d.valid) {  // it is in the first span with that base
      int span = block::rank();
      while (span < row.table().spans && load_l2(row.table().base(span)) != d.base) span += kThreads;
      begin = block::reduce(span, [](int a, int b) { return std::min(a, b); }) * kSpan,
      end = std::min(begin + kSpan, end);
    }
    const int argmax = largest_finite(row, begin, end);
    block::by_one([&] { d.cutoff = d.base, d.argmax = argmax; });
  } else if (is_steep(sampling.scale, d.base)) {  // it weighs nothing but its largest logits (docs/noise.md)
    block::by_one([&] { d.scale = 0.0f, d.cutoff = d.base; });
  } else if (sampling.filters(row.vocab())) {
    const Kept kept = kept_by(row);
    block::by_one([&] { d.cutoff = kept.cutoff, d.log_total = logf(kept.mass); });
  }
}

// The two-level race of weights that are nowhere above a row's probabilities, such as those themselves, or a residual.
// The row's own tiles, which are in its table, bound these: none can arrive before its bound does. So each warp visits
// its tiles in the order of their bounds until none of the others can win: exact, and about 1 / (what is left of the
// probability) of them. `weigh(first, w, probability)` gives the weights of four ids, the row's own by
// `probability`. kNobody where there is no weight.
template <class T, class F>
SPECDEC_DEVICE int draw(const Row<T>& row, const Distribution& d, const Noise& noise, const F& weigh) {
  const Probabilities probability = probabilities_of(d);
  const Noise inside{noise.seed, noise.position, noise.tag | kTokenRace << 8};
  const int tiles = row.table().spans * kTilesOfSpan;
  Four* const bounds = block::memory().bounds;  // each is read by the thread that writes it
  Arrived best;
  for (int begin = 0; begin < tiles; begin += 4 * kBounds) {
    SPECDEC_ROLLED
    for (int quad = block::rank(); quad < kBounds; quad += kThreads) {
      const int first = begin + 4 * quad;
      const Table table = row.table();  // not kept
      const bool there = first < tiles;
      const Words words = philox(noise, uint32_t(first / 4));
      const float share = there ? probability(load_l2(table.base(first / kTilesOfSpan))) : 0.0f;
      const Four sums = there ? load_l2(table.four_sums(first / 4)) : Four{};
      const Four tops = there && d.filtered() ? load_l2(table.four_tops(first / 4)) : Four{};
      Four bound;
      SPECDEC_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float weight = d.filtered() && tops.x[k] < d.cutoff ? 0.0f : sums.x[k] * share;
        bound.x[k] = weight > 0.0f ? quotient(exponential(words.w[k]), weight) : INFINITY;
      }
      bounds[quad] = bound;
    }
    for (;;) {
      Arrived next;
      SPECDEC_ROLLED
      for (int quad = block::rank(); quad < kBounds; quad += kThreads) {
        const Four bound = bounds[quad];
        SPECDEC_UNROLL
        for (int k = 0; k < 4; ++k)
          if (bound.x[k] < next.time) next = {bound.x[k], begin + 4 * quad + k};
      }
      const int mine = next.id;
      next = block::first_in_warp(next);
      // The bounds and the weights are rounded apart: leave room for that.
      const bool may_win = next.time * 0.9999f < best.time;
      if (!block::any(may_win)) break;
      Arrived here;
      if (may_win) {
        if (next.id == mine) bounds[(mine - begin) / 4].x[mine % 4] = INFINITY;
        const Table table = row.table();
        const float weight = load_l2(table.sum(next.id)) * probability(load_l2(table.base(next.id / kTilesOfSpan)));
        float sum = 0.0f;
        SPECDEC_ROLLED
        for (int offset = 4 * block::lane(); offset < kTileIds; offset += 4 * kLanes) {
          float w[4];
          weigh(next.id * kTileIds + offset, w, probability);
          const Words words = philox(inside, uint32_t(offset / 4));
          SPECDEC_UNROLL
          for (int k = 0; k < 4; ++k) {
            sum += w[k];
            take_part(here, exponential(words.w[k]), w[k], next.id * kTileIds + offset + k);
          }
        }
        sum = block::in_warp(sum, std::plus<>());
        here = block::first_in_warp(here);
        if (here.id != kNobody) here.time = quotient(next.time * weight, sum);
      }
      best = Earlier()(best, block::reduce(here, Earlier()));
    }
  }
  return best.id;
}

// A draw from the row itself.
template <class T>
SPECDEC_DEVICE int draw_from(const Row<T>& row, const Distribution& d, const Noise& noise) {
  return draw(row, d, noise,
              [&](int first, float (&w)[4], const auto& probability) { row.load(first, w, probability); });
}

// The winner of the race of all ids of a row that was measured with it. Where filters keep some only, those race anew.
template <class T>
SPECDEC_DEVICE int flat_race(const Row<T>& row, const Distribution& d, const Noise& noise) {
  const Table table = row.table();
  const Probabilities probability = probabilities_of(d);
  Arrived first;
  SPECDEC_ROLLED
  for (int span = block::rank(); !d.filtered() && span < table.spans; span += kThreads) {
    const float share = probability(load_l2(table.base(span)));
    const float time = quotient(load_l2(table.time(span)), share);
    if (share > 0.0f && time < INFINITY) first = Earlier()(first, {time, bits_of(load_l2(table.winner(span)))});
  }
  for (int span = block::warp(); d.filtered() && span < table.spans; span += kWarps) {
    if (load_l2(table.base(span)) < d.cutoff) continue;
    SPECDEC_ROLLED
    for (int u = 0; u < kLoads; ++u) {
      const int id = span * kSpan + load_offset(u);
      race(row.load(id), id, probability, noise, first);
    }
  }
  return block::reduce(first, Earlier()).id;
}

}  // namespace specdec::cuda
