// Rows of logits as their law sees them, and passes over them.
#pragma once

#include "noise.h"

namespace specdec::cuda {

// The rows of one request. What specdec_kernels/ops/processing.py says is done to the logits as they are loaded, and
// never written; `P` below is whether there is any of that.
struct Rows {
  const void* logits = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0, vocab = 0;
  const uint32_t* mask = nullptr;  // of the first row
  Edits edits;
  Ids drafts;  // row i counts the i first of them as output
  int64_t first_draft = 0, draft_stride = 0;
  const int64_t* parents = nullptr;  // of a tree: a row counts the drafts on its node's path
};

// Tiles that a thread asks for at a time, of a row that needs nothing but reading.
constexpr int kAhead = 4;

// What tokens are drawn from: the scalars of a distribution, or the point mass on `argmax` where that is one.
struct Law {
  float scale = 1.0f, cutoff = -INFINITY;
  double logsumexp = 0.0;
  int64_t argmax = -1;
  int64_t tile = 0;  // the winner of the tile race, where one was held
};

SPECDEC_DEVICE float float_of(const void* row, DType dtype, int64_t id) {
  if (dtype == DType::f32) return static_cast<const float*>(row)[id];
  const uint16_t bits = static_cast<const uint16_t*>(row)[id];
#ifdef __CUDACC__
  return dtype == DType::bf16 ? __uint_as_float(uint32_t(bits) << 16) : __half2float(__ushort_as_half(bits));
#else
  return dtype == DType::bf16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
#endif
}

SPECDEC_DEVICE const void* row_of(const Rows& rows, int64_t i) {
  return address({rows.logits, rows.dtype}, i * rows.stride);
}

// A logit of row i whose id has an edit.
SPECDEC_DEVICE float edited(const Rows& rows, int64_t i, int64_t edit, float x) {
  int64_t drafted = 0;
  const auto is_here = [&](int64_t draft) {
    return rows.drafts[rows.first_draft + draft * rows.draft_stride] == rows.edits.ids[edit];
  };
  if (rows.parents != nullptr)
    for (int64_t node = i; node > 0; node = rows.parents[node]) drafted += is_here(node);
  else
    for (int64_t before = 0; before < i; ++before) drafted += is_here(before);
  return specdec::edited(rows.edits, edit, drafted, x);
}

SPECDEC_DEVICE bool allowed(const Rows& rows, int64_t i, int64_t id) {
  return rows.mask == nullptr || (rows.mask[i * ((rows.vocab + 31) / 32) + id / 32] >> (id % 32) & 1) != 0;
}

template <bool P>
SPECDEC_DEVICE float logit(const Rows& rows, int64_t i, int64_t id) {
  float x = float_of(row_of(rows, i), rows.dtype, id);
  if constexpr (P) {
    const int64_t edit = first_edit(rows.edits, id);
    if (edit < rows.edits.count && rows.edits.ids[edit] == id) x = edited(rows, i, edit, x);
    if (!allowed(rows, i, id)) x = -INFINITY;
  }
  return x;
}

// The logits of kElements ids from `first`; -inf past the end of the row.
template <bool P>
SPECDEC_DEVICE void load(const Rows& rows, int64_t i, int64_t first, float (&x)[kElements]) {
  const void* row = row_of(rows, i);
#ifdef __CUDACC__
  if (first + kElements <= rows.vocab && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
    if (rows.dtype == DType::f32) {
      const float4* place = reinterpret_cast<const float4*>(static_cast<const float*>(row) + first);
      const float4 low = __ldg(place), high = __ldg(place + 1);
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
      const uint4 packed = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + first));
      const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        if (rows.dtype == DType::bf16) {
          x[2 * pair] = __uint_as_float(pairs[pair] << 16);
          x[2 * pair + 1] = __uint_as_float(pairs[pair] & 0xFFFF0000u);
        } else {
          x[2 * pair] = __half2float(__ushort_as_half(uint16_t(pairs[pair])));
          x[2 * pair + 1] = __half2float(__ushort_as_half(uint16_t(pairs[pair] >> 16)));
        }
      }
    }
  } else
#endif
  {
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e)
      x[e] = first + e < rows.vocab ? float_of(row, rows.dtype, first + e) : -INFINITY;
  }
  if constexpr (P) {
    int64_t edit = first_edit(rows.edits, first);
    for (; edit < rows.edits.count && rows.edits.ids[edit] < first + kElements && rows.edits.ids[edit] < rows.vocab;
         ++edit) {
      const int64_t place = rows.edits.ids[edit] - first;
      SPECDEC_UNROLL
      for (int e = 0; e < kElements; ++e)  // an index known to the compiler keeps the logits in registers
        if (e == place) x[e] = edited(rows, i, edit, x[e]);
    }
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e)
      if (first + e < rows.vocab && !allowed(rows, i, first + e)) x[e] = -INFINITY;
  }
}

// Subtracting -inf from -inf would give nan where the sum is 0.
SPECDEC_DEVICE float usable_base(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// scale * (x - base), in halves: the difference of two floats may be none.
SPECDEC_DEVICE float gap(float scale, float x, float base) { return 2.0f * scale * (0.5f * x - 0.5f * base); }

// A row is measured into its table: of every tile the largest logit, and the sum of exp(scale * (logit - that)) of
// what is not below `pivot`. A nan or +inf shows in the sum and not in the maximum. All else that is asked about a row
// is read from there, so it does not matter which team measured which tile. Returns the smallest logit that is not
// below.
struct Table {
  float* maxima;
  float* sums;
};

template <bool P>
SPECDEC_PASS float tabulate(const Team& team, const Rows& rows, int64_t i, int64_t begin, int64_t end, float scale,
                            float pivot, const Table& table) {
  float least = INFINITY;
  for_tiles<P ? 1 : kAhead>(team, begin, end, [&](int64_t tile, bool there) {
    float x[kElements], top = -INFINITY, sum = 0.0f;
    load<P>(rows, i, there ? own_ids(team, tile) : rows.vocab, x);
    SPECDEC_UNROLL
    for (float& value : x) {
      if (value < pivot) value = -INFINITY;
      if (value >= pivot) least = fminf(least, value);
      if (value < INFINITY) top = fmaxf(top, value);
    }
    top = team.in_group(top, Larger());
    const float base = usable_base(top);
    SPECDEC_UNROLL
    for (const float value : x) sum += expf(gap(scale, value, base));
    sum = team.in_group(sum, Plus());
    if (there && team.rank() % kGroup == 0) table.maxima[tile] = top, table.sums[tile] = sum;
  });
  return least;
}

// What the table of a row says.
struct Summary {
  double total;     // the sum of exp(scale * (logit - top))
  float top;        // the largest logit
  int64_t largest;  // the first tile that has it
  int64_t winner;   // of the tile race
  bool valid;
};

struct Peak {
  float value;
  int32_t tile;
};
struct Higher {
  SPECDEC_DEVICE Peak operator()(const Peak& a, const Peak& b) const {
    return b.value > a.value || (b.value == a.value && b.tile < a.tile) ? b : a;
  }
};

SPECDEC_PASS Summary summary(const Team& team, const Rows& rows, float scale, const Table& table, const Noise& noise,
                             bool race) {
  const int64_t tiles = tiles_of(rows.vocab);
  Peak peak{-INFINITY, 0x7FFFFFFF};
  for (int64_t tile = team.rank(); tile < tiles; tile += team.size())
    peak = Higher()(peak, {fresh(table.maxima + tile), int32_t(tile)});
  peak = team.reduce(peak, Higher());
  const float base = usable_base(peak.value);
  double total = 0.0;
  Arrived first;
  for (int64_t tile = team.rank(); tile < tiles; tile += team.size()) {
    const float weight = fresh(table.sums + tile) * expf(gap(scale, fresh(table.maxima + tile), base));
    total += double(weight);
    if (race) take_part(first, exponential(noise, tile), weight, tile);
  }
  total = team.reduce(total, Plus());
  if (race) first = team.reduce(first, Earlier());
  return {total, peak.value, peak.tile, first.id, total > 0.0 && total < INFINITY};
}

// The law of a row that is valid, `cutoff` the smallest logit that was measured. A steep row (docs/noise.md) weighs
// nothing but its largest logits, by its table too.
SPECDEC_DEVICE Law law_from(const Summary& found, float scale, float cutoff) {
  const bool steep = is_steep(scale, found.top);
  if (steep) scale = 0.0f, cutoff = found.top;
  return {scale, cutoff, double(scale) * double(found.top) + log(found.total), -1, found.winner};
}

// The first id in a tile whose logit is `top`; 0 where no logit is finite.
template <bool P>
SPECDEC_PASS int64_t largest_token(const Team& team, const Rows& rows, int64_t i, float top, int64_t tile) {
  int64_t found = kNobody;
  for (int64_t id = tile * kTile + team.rank(); id < (tile + 1) * kTile && id < rows.vocab; id += team.size())
    if (logit<P>(rows, i, id) == top && id < found) found = id;
  found = team.reduce(found, Smaller());
  return top > -INFINITY && found != kNobody ? found : 0;
}

// [logit >= cutoff] * exp(scale * logit - logsumexp), the logsumexp as a sum of two floats.
class Probabilities {
 public:
  SPECDEC_DEVICE explicit Probabilities(const Law& law)
      : scale_(law.scale),
        cutoff_(law.cutoff),
        high_(float(law.logsumexp)),
        low_(float(law.logsumexp - double(high_))) {}
  SPECDEC_DEVICE float operator()(float logit) const {
    return logit < cutoff_ ? 0.0f : expf(fmaf(logit, scale_, -high_) - low_);
  }

 private:
  float scale_, cutoff_, high_, low_;
};

// Of one token of a valid row.
template <bool P>
SPECDEC_DEVICE double log_prob(const Rows& rows, int64_t i, const Law& law, int64_t token) {
  if (law.argmax >= 0) return token == law.argmax ? 0.0 : -INFINITY;
  const float x = logit<P>(rows, i, token);
  return x < law.cutoff ? -INFINITY : double(law.scale) * double(x) - law.logsumexp;
}

// The token race inside a tile; `weight(id)` is asked for ids of the vocabulary.
template <class F>
SPECDEC_DEVICE int64_t draw_inside(const Team& team, int64_t tile, int64_t vocab, Noise noise, const F& weight) {
  noise.tag |= kTokenRace << 8;
  Arrived first;
  for (int64_t entry = team.rank(); entry < kTile && tile * kTile + entry < vocab; entry += team.size())
    take_part(first, exponential(noise, entry), weight(tile * kTile + entry), tile * kTile + entry);
  return team.reduce(first, Earlier()).id;
}

// A token of the winning tile by the row's own probabilities.
template <bool P>
SPECDEC_DEVICE int64_t draw_from_row(const Team& team, const Rows& rows, int64_t i, const Law& law,
                                     const Noise& noise) {
  const Probabilities probability(law);
  return draw_inside(team, law.tile, rows.vocab, noise, [&](int64_t id) { return probability(logit<P>(rows, i, id)); });
}

// All ids in one race: the coupled rule's draw, its noise keyed on the absolute position.
template <bool P>
SPECDEC_PASS int64_t flat_race(const Team& team, const Rows& rows, int64_t i, const Law& law, uint64_t seed,
                               uint64_t position) {
  const Noise noise{seed, position, kCoupled | kTokenRace << 8};
  const Probabilities probability(law);
  Arrived first;
  for_tiles<1>(team, 0, tiles_of(rows.vocab), [&](int64_t tile, bool there) {
    const int64_t ids = there ? own_ids(team, tile) : rows.vocab;
    float x[kElements];
    load<P>(rows, i, ids, x);
    SPECDEC_UNROLL
    for (int counter = 0; counter < kElements / 4; ++counter) {
      const Words words = philox(noise, uint32_t(ids / 4 + counter));
      for (int word = 0; word < 4; ++word)
        take_part(first, exponential(words.w[word]), probability(x[4 * counter + word]), ids + 4 * counter + word);
    }
  });
  return team.reduce(first, Earlier()).id;
}

}  // namespace specdec::cuda
