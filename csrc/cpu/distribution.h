// One distribution of one request: a row of logits, its three scalars, and draws from it (algorithms.md, 7 and 8).
#pragma once

#include <cmath>
#include <vector>

#include "elements.h"
#include "kernels.h"
#include "team.h"

namespace specdec {

constexpr uint32_t kDraft = 0, kAccept = 1, kTarget = 2;  // purposes
constexpr uint32_t kTileRace = 0, kTokenRace = 1;         // levels

// A piece is what one thread draws from a shared pass: 8,192 tokens, a microsecond or two.
constexpr int64_t kPieceTiles = 64;

inline int64_t tiles_of(int64_t vocab) { return (vocab + kTile - 1) / kTile; }
inline uint32_t pieces_of(int64_t tiles) { return uint32_t((tiles + kPieceTiles - 1) / kPieceTiles); }

// Per tile: largest logit, and weight in a race.
struct TileSpace {
  std::vector<float> max, weight;

  void resize(int64_t tiles) {
    const auto padded = size_t((tiles + kRaceBlock - 1) / kRaceBlock * kRaceBlock);
    max.assign(padded, 0.0f);
    weight.assign(padded, 0.0f);
  }
};

// temperature 0, or so small that its inverse overflows, is greedy: scale = inf marks a point mass.
inline float scale_of(float temperature) { return 1.0f / temperature; }
inline bool is_greedy(float scale) { return std::isinf(scale); }

class RowView {
 public:
  RowView(const Kernels& kernels, Row row, float scale, TileSpace& space)
      : kernels_(kernels), row_(row), scale_(scale), tiles_(tiles_of(row.vocab)), space_(space) {}

  // Work on the tiles of one piece; `finish` once all pieces are done.
  void pass(uint32_t piece) {
    const int64_t begin = int64_t(piece) * kPieceTiles, end = begin + kPieceTiles < tiles_ ? begin + kPieceTiles : tiles_;
    if (is_greedy(scale_))
      kernels_.tile_max(row_, begin, end, space_.max.data());
    else
      kernels_.tile_stats(row_, scale_, begin, end, space_.max.data(), space_.weight.data());
  }

  void finish() { is_greedy(scale_) ? finish_greedy() : finish_sampled(); }

  uint32_t pieces() const { return pieces_of(tiles_); }
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

  // The two-level race; the tile weights are a by-product of the pass.
  int64_t draw(Noise noise) const {
    if (is_greedy(scale_)) return argmax_;
    const Distribution dist = distribution();
    return race(noise, [&](int64_t tile, float* weights) { kernels_.token_probs(row_, dist, tile, weights); });
  }

  // The same over whatever weights the tiles have by now; -1 if none is positive.
  template <class F>
  int64_t race(Noise noise, const F& token_weights) const {
    const uint32_t tag = noise.tag;
    noise.tag = tag | kTileRace << 8;
    const int64_t tile = kernels_.race(space_.weight.data(), int64_t(space_.weight.size()), noise);
    if (tile < 0) return -1;
    float weights[kTile];
    token_weights(tile, weights);
    noise.tag = tag | kTokenRace << 8;
    const int64_t winner = kernels_.race(weights, kTile, noise);
    return winner < 0 ? -1 : tile * kTile + winner;
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

  TileSpace& space() const { return space_; }

 private:
  void finish_sampled() {
    const Combined combined = kernels_.combine(space_.max.data(), space_.weight.data(), tiles_, scale_);
    max_ = combined.max;
    lse_ = double(scale_) * double(max_) + std::log(double(combined.total));
    valid_ = std::isfinite(combined.total) && std::isfinite(max_);
  }

  void finish_greedy() {
    max_ = -INFINITY;
    int64_t tile = 0;
    for (int64_t t = 0; t < tiles_; ++t) {
      const float m = space_.max[size_t(t)];
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
  int64_t tiles_;
  TileSpace& space_;
  float max_ = 0.0f;
  double lse_ = 0.0;
  bool valid_ = false;
  int64_t argmax_ = -1;
};

}  // namespace specdec
