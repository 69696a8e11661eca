// One distribution of one request: a row of logits, its three scalars, and draws from it (algorithms.md, 7 and 8).
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "elements.h"
#include "kernels.h"
#include "team.h"

namespace specdec {

constexpr uint32_t kDraft = 0, kAccept = 1, kTarget = 2;  // purposes
constexpr uint32_t kTileRace = 0, kTokenRace = 1;         // levels

inline int64_t tiles_of(int64_t vocab) { return (vocab + kTile - 1) / kTile; }

// A row is cut into one piece a thread: long runs of memory keep the prefetchers going. (With 16 pieces a row, two
// threads took a tenth longer.) Whole groups of tiles, so that the cut changes no rounding.
inline int64_t piece_tiles(int64_t tiles, int64_t threads) {
  constexpr int64_t kGroup = 16, kLeast = 64;
  const int64_t share = (tiles + threads - 1) / threads;
  return std::max(kLeast, (share + kGroup - 1) / kGroup * kGroup);
}

// Per tile: its largest logit (greedy) or the base of its sum, its weight in a race, and when it arrives there.
struct TileSpace {
  std::vector<float> level, weight, arrival;

  void resize(int64_t tiles) {
    const auto padded = size_t((tiles + kRaceBlock - 1) / kRaceBlock * kRaceBlock);
    level.assign(padded, -INFINITY);
    weight.assign(padded, 0.0f);
    arrival.resize(padded);
  }
};

// Temperature 0, or too small for float32 scalars, is greedy: scale = inf marks a point mass.
constexpr float kMinTemperature = 1e-5f;
inline float scale_of(float temperature) { return temperature < kMinTemperature ? INFINITY : 1.0f / temperature; }
inline bool is_greedy(float scale) { return std::isinf(scale); }

class RowView {
 public:
  RowView(const Kernels& kernels, Row row, float scale, int64_t threads, TileSpace& space)
      : kernels_(kernels),
        row_(row),
        scale_(scale),
        tiles_(tiles_of(row.vocab)),
        piece_(piece_tiles(tiles_, threads)),
        space_(space) {}

  // Work on the tiles of one piece; `finish` once all pieces are done.
  void pass(uint32_t piece) {
    const int64_t begin = int64_t(piece) * piece_, end = std::min(begin + piece_, tiles_);
    if (is_greedy(scale_))
      kernels_.tile_max(row_, begin, end, space_.level.data());
    else
      kernels_.tile_stats(row_, scale_, begin, end, space_.level.data(), space_.weight.data());
  }

  void finish() { is_greedy(scale_) ? finish_greedy() : finish_sampled(); }

  uint32_t pieces() const { return uint32_t((tiles_ + piece_ - 1) / piece_); }
  bool valid() const { return valid_; }
  float scale() const { return scale_; }
  float max() const { return max_; }
  double logsumexp() const { return lse_; }
  const Row& row() const { return row_; }

  Distribution distribution() const {
    const float high = float(lse_);
    return {scale_, -INFINITY, high, float(lse_ - double(high))};
  }

  // Of one token, in double precision.
  double logprob(int64_t token) const {
    if (is_greedy(scale_)) return token == argmax_ ? 0.0 : -INFINITY;
    return double(scale_) * double(logit(token)) - lse_;
  }

  float logit(int64_t token) const {
    switch (row_.dtype) {
      case DType::bf16: return to_float(static_cast<const BFloat16*>(row_.logits)[token]);
      case DType::f16: return to_float(static_cast<const Half*>(row_.logits)[token]);
      default: return static_cast<const float*>(row_.logits)[token];
    }
  }

  // The two-level race. The tile weights are a by-product of the pass.
  int64_t draw(Noise noise) const {
    if (is_greedy(scale_)) return argmax_;
    const int64_t tile = first_tile(noise).index;
    float weights[kTile];
    kernels_.token_probs(row_, distribution(), tile, weights);
    return draw_inside(tile, weights, noise);
  }

  // The two-level race for weights of which this row's probabilities are an upper bound, such as a residual, with
  // `token_weights(tile, out)` giving those of one tile. A tile cannot arrive before its bound does, so tiles are
  // looked at in the order of their bounds until none of the others can win: exact, and about 1 / (what is left of
  // the probability) tiles are ever looked at. -1 if no weight is positive.
  template <class F>
  int64_t draw_below(Noise noise, const F& token_weights) const {
    float* bounds = space_.arrival.data();
    float weights[2][kTile];
    float* candidate = weights[0];
    float* best = weights[1];
    int64_t winner = -1;
    float winning = INFINITY;
    for (Arrival next = first_tile(noise); next.time < INFINITY; next = first_of(bounds)) {
      // The bound and the weights are rounded apart: leave room for that.
      if (next.time * 0.9999f >= winning) break;
      bounds[next.index] = INFINITY;
      token_weights(next.index, candidate);
      double sum = 0.0;
      for (int64_t i = 0; i < kTile; ++i) sum += double(candidate[i]);
      const float time = float(double(next.time) * double(space_.weight[size_t(next.index)]) / (sum * total_));
      if (time < winning || (time == winning && next.index < winner)) {
        winning = time;
        winner = next.index;
        std::swap(candidate, best);
      }
    }
    return winner < 0 ? -1 : draw_inside(winner, best, noise);
  }

  // What a row that is not valid gives: its largest finite logit, lowest id on ties, 0 if there is none.
  int64_t largest_finite() const {
    int64_t best = 0;
    float largest = -INFINITY;
    for (int64_t v = 0; v < row_.vocab; ++v) {
      const float x = logit(v);
      if (std::isfinite(x) && x > largest) largest = x, best = v;
    }
    return best;
  }

 private:
  Arrival first_of(const float* arrivals) const {
    return kernels_.first_arrival(arrivals, int64_t(space_.arrival.size()));
  }

  Arrival first_tile(Noise noise) const {
    noise.tag |= kTileRace << 8;
    kernels_.arrivals(space_.weight.data(), int64_t(space_.weight.size()), noise, space_.arrival.data());
    return first_of(space_.arrival.data());
  }

  int64_t draw_inside(int64_t tile, const float* weights, Noise noise) const {
    noise.tag |= kTokenRace << 8;
    float times[kTile];
    kernels_.arrivals(weights, kTile, noise, times);
    return tile * kTile + kernels_.first_arrival(times, kTile).index;
  }

  void finish_sampled() {
    const auto padded = int64_t(space_.weight.size());
    const Combined combined = kernels_.combine(space_.level.data(), space_.weight.data(), padded, scale_);
    total_ = combined.total;
    lse_ = double(scale_) * double(combined.base) + std::log(double(combined.total));
    valid_ = std::isfinite(lse_);
  }

  void finish_greedy() {
    max_ = -INFINITY;
    int64_t tile = 0;
    for (int64_t t = 0; t < tiles_; ++t) {
      const float m = space_.level[size_t(t)];
      if (m > max_ || std::isnan(m)) max_ = m, tile = t;
      if (std::isnan(m)) break;
    }
    valid_ = std::isfinite(max_);
    if (!valid_) return;
    argmax_ = tile * kTile;
    while (logit(argmax_) != max_) ++argmax_;
  }

  const Kernels& kernels_;
  Row row_;
  float scale_;
  int64_t tiles_, piece_;
  TileSpace& space_;
  float max_ = 0.0f;
  double lse_ = 0.0, total_ = 0.0;  // total_: of the tile weights
  bool valid_ = false;
  int64_t argmax_ = -1;
};

}  // namespace specdec
