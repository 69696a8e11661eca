// One distribution of one request: a row of logits, its three scalars, and draws from it (algorithms.md, 7 and 8).
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "filters.h"
#include "kernels.h"
#include "source.h"
#include "thread_group.h"
#include "tile_space.h"

namespace specdec {

// A row is cut into one piece a thread: long runs of memory keep the prefetchers going. (With 16 pieces a row, two
// threads took a tenth longer.)
inline uint32_t pieces_of(int64_t tiles, int64_t threads) {
  constexpr int64_t kLeast = 64;
  return uint32_t(std::clamp<int64_t>((tiles + kLeast - 1) / kLeast, 1, threads));
}

inline bool is_greedy(float scale) { return std::isinf(scale); }

// Temperature and filters of one request.
struct Sampling {
  float scale;
  Filters filters;
};

// The sum of a tile's weights, in eight lanes: one after the other they would wait for each other.
inline double sum_of_tile(const float* weights) {
  double lanes[8] = {};
  for (int64_t i = 0; i < kTile; i += 8)
    for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] += double(weights[i + lane]);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Who works on a row: an instruction set, and threads that share a pass over it.
struct Workers {
  const Kernels& kernels;
  int64_t threads;
  SharedPass& pass;
};

class RowView {
 public:
  // `space` is where the pass leaves what it finds.
  RowView(const Workers& workers, const Source& source, const Sampling& sampling, TileSpace& space)
      : kernels_(workers.kernels),
        shared_(workers.pass),
        source_(source),
        scale_(sampling.scale),
        filters_(sampling.filters),
        tiles_(tiles_of(source.row().vocab)),
        pieces_(pieces_of(tiles_, workers.threads)),
        space_(space) {
    space.pieces.resize(pieces_);
    if (!is_greedy(scale_) && source.plain()) base_ = kernels_.estimate_max(source_.row(), 0, tiles_);
  }

  // Work on the tiles of one piece; `finish` once all pieces are done.
  void pass(uint32_t piece) { space_.pieces[piece].result = pass_over(piece); }
  void finish() { is_greedy(scale_) ? finish_greedy() : finish_sampled(); }

  // Calls work(piece) for every piece, with whoever helps.
  template <class F>
  void each_piece(const F& work) const {
    shared_.run(pieces(), work);
  }

  void pass_all() {
    each_piece([&](uint32_t piece) { pass(piece); });
    finish();
  }

  uint32_t pieces() const { return pieces_; }
  int64_t tiles() const { return tiles_; }
  bool valid() const { return valid_; }
  int64_t argmax() const { return argmax_; }
  const Kernels& kernels() const { return kernels_; }
  const Source& source() const { return source_; }
  float scale() const { return scale_; }
  // The scalars of the distribution, as they are handed over.
  float cutoff() const { return is_greedy(scale_) ? max_ : cutoff_; }
  double logsumexp() const { return is_greedy(scale_) ? 0.0 : lse_; }

  Distribution distribution() const {
    const float high = float(lse_);
    return {scale_, cutoff_, high, float(lse_ - double(high))};
  }

  // Of one token, in double precision.
  double logprob(int64_t token) const {
    if (is_greedy(scale_)) return token == argmax_ ? 0.0 : -INFINITY;
    const float logit = source_.logit(token);
    return logit < cutoff_ ? -INFINITY : double(scale_) * double(logit) - lse_;
  }

  // The probabilities of one tile (128), but for what was removed.
  void tile_probs(int64_t tile, float* weights) const {
    float logits[kTile];
    const Source::At at = source_.at(tile, logits);
    kernels_.token_probs(at.row, distribution(), at.tile, weights);
    for (const int64_t token : removed_)
      if (token / kTile == tile) weights[token % kTile] = 0.0f;
  }

  // (probability - that of `draft`)+ of one tile.
  void tile_residuals(const Row& draft, const Distribution& dist, int64_t tile, float* weights) const {
    float logits[kTile], draft_logits[kTile];
    const Source::At at = source_.at(tile, logits);
    if (at.row.logits != logits) return kernels_.token_residuals(at.row, distribution(), draft, dist, tile, weights);
    Source(draft).fill(tile, 1, draft_logits);  // both as the first tile of a row
    kernels_.token_residuals(at.row, distribution(), {draft_logits, DType::f32, kTile}, dist, 0, weights);
  }

  // The sum of weights of which this row's probabilities are an upper bound, such as a residual, with
  // `token_weights(tile, out)` giving those of one tile.
  template <class F>
  double mass_below(const F& token_weights) const {
    std::vector<double> sums(pieces(), 0.0);
    each_piece([&](uint32_t piece) {
      const auto [begin, end] = tiles_of_piece(piece);
      float weights[kTile];
      for (int64_t tile = begin; tile < end; ++tile) {
        if (space_.weight[size_t(tile)] == 0.0f) continue;
        token_weights(tile, weights);
        sums[piece] += sum_of_tile(weights);
      }
    });
    double sum = 0.0;
    for (const double s : sums) sum += s;
    return sum;
  }

  // Whether that sum is more than `needed`, looking at heavy tiles first and at no more of them than the answer takes.
  template <class F>
  bool mass_exceeds(double needed, const F& token_weights) const {
    double sum = 0.0, left = 1.0, heavier = INFINITY;
    float weights[kTile];
    for (double least = total_ / 16.0;; least = least > total_ * 1e-6 ? least / 16.0 : 0.0) {
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const double weight = double(space_.weight[size_t(tile)]);
        if (weight == 0.0 || weight < least || weight >= heavier) continue;
        token_weights(tile, weights);
        sum += sum_of_tile(weights);
        left -= weight / total_;
        if (sum > needed) return true;
        // The two are rounded apart: leave room for that.
        if (sum + left * 1.0001 + 1e-6 < needed) return false;
      }
      if (least == 0.0) return false;
      heavier = least;
    }
  }

  // The two-level race. The tile weights are a by-product of the pass.
  int64_t draw(Noise noise) const {
    if (is_greedy(scale_)) return argmax_;
    const int64_t tile = first_tile(noise).index;
    float weights[kTile];
    tile_probs(tile, weights);
    return draw_inside(tile, weights, noise);
  }

  // Later draws do not give this token again.
  void remove(int64_t token) {
    removed_.push_back(token);
    const int64_t tile = token / kTile;
    float weights[kTile];
    tile_probs(tile, weights);
    space_.weight[size_t(tile)] = float(sum_of_tile(weights) * total_);
  }

  // Of the distribution's probability, what removed tokens left.
  double share_left() const {
    double sum = 0.0;
    for (const float w : space_.weight) sum += double(w);
    return sum / total_;
  }

  // `visit(token, logit)` for the ids of one piece that the filters keep, passing over tiles whose logits are all below
  // `least()`.
  template <class Least, class F>
  void each_logit(uint32_t piece, const Least& least, const F& visit) const {
    const auto [begin, end] = tiles_of_piece(piece);
    float logits[kTile];
    for (int64_t tile = begin; tile < end; ++tile) {
      const Source::At at = source_.at(tile, logits);
      if (kernels_.tile_peak(at.row, at.tile) < least()) continue;
      source_.fill(tile, 1, logits);
      for (int64_t i = 0; i < kTile; ++i)
        if (logits[i] >= cutoff_ && logits[i] > -INFINITY) visit(tile * kTile + i, logits[i]);
    }
  }

  // `visit(token, time)` for the ids of one piece that take part in the flat race with at least this probability.
  template <class F>
  void each_arrival(uint32_t piece, const Noise& noise, float least, const F& visit) const {
    flat_race(piece, noise, [&](int64_t tile, const float* weights, const float* times) {
      for (int64_t i = 0; i < kTile; ++i)
        if (weights[i] >= least) visit(tile * kTile + i, times[i]);
    });
  }

  // The flat race, over all ids at once.
  int64_t flat_draw(const Noise& noise) const {
    if (is_greedy(scale_)) return argmax_;
    std::vector<Arrival> first(pieces(), {-1, INFINITY});
    each_piece([&](uint32_t piece) {
      flat_race(piece, noise, [&](int64_t tile, const float*, const float* times) {
        const Arrival here = kernels_.first_arrival(times, kTile);
        if (here.time < first[piece].time) first[piece] = {tile * kTile + here.index, here.time};
      });
    });
    return std::min_element(first.begin(), first.end(), [](auto& a, auto& b) { return a.time < b.time; })->index;
  }

  // The two-level race for such weights. A tile cannot arrive before its bound does, so tiles are looked at in the
  // order of their bounds until none of the others can win: exact, and about 1 / (what is left of the probability)
  // tiles are ever looked at. -1 if no weight is positive. `announce` is told of a tile one look before.
  template <class F, class G>
  int64_t draw_below(Noise noise, const F& token_weights, const G& announce) const {
    float* bounds = space_.arrival.data();
    float weights[2][kTile];
    float* candidate = weights[0];
    float* best = weights[1];
    int64_t winner = -1;
    float winning = INFINITY;
    const auto announced = [&](const Arrival& arrival) {
      prefetch(source_.row(), arrival.index * kTile, kTile);
      announce(arrival.index);
      return arrival;
    };
    Arrival next = announced(first_tile(noise));
    // The bound and the weights are rounded apart: leave room for that.
    while (next.time < INFINITY && next.time * 0.9999f < winning) {
      const Arrival here = next;
      bounds[here.index] = INFINITY;
      next = announced(first_of(bounds));
      token_weights(here.index, candidate);
      const double sum = sum_of_tile(candidate);
      const float time = float(double(here.time) * double(space_.weight[size_t(here.index)]) / (sum * total_));
      if (time < winning || (time == winning && here.index < winner)) {
        winning = time;
        winner = here.index;
        std::swap(candidate, best);
      }
    }
    return winner < 0 ? -1 : draw_inside(winner, best, noise);
  }

  // What a row that is not valid gives: its largest finite logit, lowest id on ties, 0 if there is none.
  int64_t largest_finite() const {
    int64_t best = 0;
    float largest = -INFINITY;
    for (int64_t v = 0; v < source_.row().vocab; ++v) {
      const float x = source_.logit(v);
      if (std::isfinite(x) && x > largest) largest = x, best = v;
    }
    return best;
  }

 private:
  // Tiles that are processed before a kernel reads them.
  static constexpr int64_t kFilled = 16;

  // Whole groups of tiles, so that the cut changes no rounding, and no fewer in the first piece: its owner begins
  // before who helps.
  std::pair<int64_t, int64_t> tiles_of_piece(uint32_t piece) const {
    constexpr int64_t kGroup = 16;
    const auto begin = [&](int64_t p) {
      return std::min((tiles_ * p / pieces_ + kGroup - 1) / kGroup * kGroup, tiles_);
    };
    return {begin(piece), begin(piece + 1)};
  }

  // `visit(tile, probabilities, arrivals)` for the tiles of one piece that take part in the flat race.
  template <class F>
  void flat_race(uint32_t piece, Noise noise, const F& visit) const {
    const auto [begin, end] = tiles_of_piece(piece);
    noise.tag |= kTokenRace << 8;
    float weights[kTile], times[kTile];
    for (int64_t tile = begin; tile < end; ++tile) {
      if (space_.weight[size_t(tile)] == 0.0f) continue;
      tile_probs(tile, weights);
      kernels_.arrivals(weights, tile * kTile, kTile, noise, times);
      visit(tile, weights, times);
    }
  }

  Summed pass_over(uint32_t piece) {
    const auto [begin, end] = tiles_of_piece(piece);
    if (source_.plain()) return pass_over(source_.row(), begin, end, 0);
    float logits[kFilled * kTile];
    for (int64_t tile = begin; tile < end; tile += kFilled) {
      const int64_t stop = std::min(tile + kFilled, end);
      if (!source_.touches(tile, stop)) {
        pass_over(source_.row(), tile, stop, 0);
        continue;
      }
      source_.fill(tile, stop - tile, logits);
      pass_over({logits, DType::f32, (stop - tile) * kTile}, 0, stop - tile, tile);
    }
    return {false, 0};  // a base each
  }

  // Tiles [begin, end) of `row` are those of this row from `offset` on.
  Summed pass_over(const Row& row, int64_t begin, int64_t end, int64_t offset) {
    float* level = space_.level.data() + offset;
    if (is_greedy(scale_)) {
      kernels_.tile_max(row, begin, end, level);
      return {};
    }
    // Nothing but the distribution's own logits will do for a base: those of these tiles, where the row is not the
    // distribution's.
    const float base = source_.plain() ? base_ : kernels_.estimate_max(row, begin, end);
    return kernels_.tile_stats(row, scale_, base, begin, end, level, space_.weight.data() + offset);
  }

  Arrival first_of(const float* arrivals) const {
    return kernels_.first_arrival(arrivals, int64_t(space_.arrival.size()));
  }

  Arrival first_tile(Noise noise) const {
    noise.tag |= kTileRace << 8;
    // All at once: other cores have written some, and the race asks for each only when it has noise for it.
    for (size_t i = 0; i < space_.weight.size(); i += 16) __builtin_prefetch(&space_.weight[i]);
    kernels_.arrivals(space_.weight.data(), 0, int64_t(space_.weight.size()), noise, space_.arrival.data());
    return first_of(space_.arrival.data());
  }

  int64_t draw_inside(int64_t tile, const float* weights, Noise noise) const {
    noise.tag |= kTokenRace << 8;
    float times[kTile];
    kernels_.arrivals(weights, 0, kTile, noise, times);
    return tile * kTile + kernels_.first_arrival(times, kTile).index;
  }

  void finish_sampled() {
    Summed found{true, 0};
    for (const auto& [result] : space_.pieces) {
      found.shared = found.shared && result.shared;
      found.total += result.total;
    }
    float base = base_;
    if (found.shared) {
      total_ = std::ldexp(double(found.total), -kFixedBits);
    } else {
      const auto padded = int64_t(space_.weight.size());
      const Combined combined =
          kernels_.combine(space_.level.data(), space_.weight.data(), padded, scale_, space_.weight.data());
      base = combined.base;
      total_ = combined.total;
    }
    const bool steep = is_steep(scale_, base);  // then the largest logits are the tiles' own bases
    if (steep) scale_ = 0.0f, cutoff_ = base;
    lse_ = double(scale_) * double(base) + std::log(total_);
    valid_ = std::isfinite(lse_);
    if (valid_ && !steep && filters_.any()) filter(base);
  }

  // Tiles lose the weight of what the filters take away.
  void filter(float base) {
    CutoffSearch search(kernels_, source_, scale_, base, total_, tiles_, space_);
    const float pivot = search.pivot(filters_);
    if (pivot == -INFINITY) return;
    const auto kept = search.tiles_reaching(pivot);
    std::fill_n(space_.weight.begin(), tiles_, 0.0f);
    cutoff_ = INFINITY;
    total_ = 0.0;
    float logits[kTile];
    for (const int32_t tile : kept) {
      const Source::At at = source_.at(tile, logits);
      const TailStats above = kernels_.tile_above(at.row, scale_, base, pivot, at.tile);
      space_.weight[size_t(tile)] = above.mass;
      total_ += double(above.mass);
      cutoff_ = std::min(cutoff_, above.least);
    }
    lse_ = double(scale_) * double(base) + std::log(total_);
  }

  void finish_greedy() {
    // The first tile with a nan, which no number is above; else the first with the largest logit.
    const auto top = std::max_element(space_.level.begin(), space_.level.begin() + tiles_,
                                      [](float a, float b) { return a < b || (std::isnan(b) && !std::isnan(a)); });
    max_ = *top;
    valid_ = std::isfinite(max_);
    if (!valid_) return;
    argmax_ = (top - space_.level.begin()) * kTile;
    while (source_.logit(argmax_) != max_) ++argmax_;
  }

  const Kernels& kernels_;
  SharedPass& shared_;
  Source source_;
  float scale_;
  Filters filters_;
  int64_t tiles_;
  uint32_t pieces_;
  TileSpace& space_;
  float base_ = -INFINITY;  // of the weights of tiles, if all share it
  float max_ = 0.0f, cutoff_ = -INFINITY;
  double lse_ = 0.0, total_ = 0.0;  // total_: of the tile weights
  bool valid_ = false;
  int64_t argmax_ = -1;
  std::vector<int64_t> removed_;
};

}  // namespace specdec
