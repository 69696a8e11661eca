// The distribution drafts were drawn from, and what is left of a target's distribution once some of them were rejected.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "distribution.h"

namespace specdec {

// What the drafts of one row were drawn from.
struct DraftDistribution {
  bool point_mass = false;
  bool valid = true;
  Row row{};
  Distribution dist{};

  double prob(int64_t token) const {
    if (point_mass) return 1.0;
    const float logit = logit_of(row, token);
    if (logit < dist.cutoff) return 0.0;
    return std::exp(double(dist.scale) * double(logit) - (double(dist.lse_high) + double(dist.lse_low)));
  }

  // Whether the row, and the scalars that came with it, say anything about this token.
  bool usable(int64_t token) const { return valid && std::isfinite(prob(token)); }

  // That of every token divided by `factor`.
  Distribution divided_by(double factor) const {
    const double lse = double(dist.lse_high) + double(dist.lse_low) + std::log(factor);
    const float high = float(lse);
    return {dist.scale, dist.cutoff, high, float(lse - double(high))};
  }
};

// What the tokens rejected at a row leave of its distribution (algorithms.md, 1, 2 and 5). Nothing of the size of the
// vocabulary is written: rejecting x_1, ..., x_j one after the other leaves, up to a factor, (target - taken * draft)+
// with one number `taken`, since a maximum with 0 can be taken at the end; but siblings drawn without replacement were
// not drawn from what was rejected before them, so of a rejected token only what was taken up to its own rejection
// counts.
class Residual {
 public:
  // `path_prob` is the chance that the row is visited at all, as the rules block and traversal count it; 1 for the
  // others.
  Residual(const RowView& target, const DraftDistribution& draft, bool replacement, double path_prob = 1.0)
      : target_(&target), draft_(draft), replacement_(replacement), path_prob_(path_prob) {}

  bool untouched() const { return rejected_.empty(); }

  // The token rule's test against what is left. Strict: what the target excludes is never accepted, even by uniform 0.
  bool accepts(int64_t token, double uniform) {
    update();
    return uniform * mass_ * draft_prob(token) < weight(token);
  }

  // The chance that what comes after `token` is visited. What the target excludes never is, whatever the draft was
  // declared to be: 0 / 0 is 0.
  double path_prob_of(int64_t token) {
    update();
    const double left = weight(token);
    return left > 0.0 ? std::min(1.0, path_prob_ * left / mass_ / draft_prob(token)) : 0.0;
  }

  void reject(int64_t token) {
    update();
    const double rest = draft_left();
    if (rest > 0.0 && path_prob_ > 0.0 && mass_ > 0.0) {
      const double factor = path_prob_ * rest / mass_;
      factor_ = std::isinf(factor_) ? factor : 1.0 / (1.0 / factor_ + 1.0 / factor);
    }
    settled_ = draft_known_ = false;
    if (was_rejected(token)) return;  // a sibling drawn twice: what comes after it was not drawn from it again
    drafted_ += draft_.prob(token);
    rejected_.push_back({token, factor_});
  }

  // Whether a uniform is below the chance of the row itself once these tokens are rejected, without taking more of the
  // residual's sum than the answer needs.
  bool reached(double uniform) {
    if (settled_ || path_prob_ == 1.0) return uniform < path_prob_;
    if (path_prob_ == 0.0) return false;
    divide();
    const double needed = uniform * (1.0 - path_prob_) / (1.0 - uniform) / path_prob_ * mass_;
    double left;
    if (draft_.point_mass && subtract(left)) return left > needed;
    return target_->mass_exceeds(needed, [&](int64_t tile, float* weights) { tile_weights(tile, weights); });
  }

  // In proportion to what is left of every id of one tile.
  void tile_weights(int64_t tile, float* weights) const {
    if (draft_.point_mass || untouched())
      target_->tile_probs(tile, weights);
    else
      target_->tile_residuals(draft_.row, divided_, tile, weights);
    for (const Rejected& r : rejected_) {
      if (r.token / kTile != tile || is_latest(r)) continue;
      weights[r.token % kTile] = draft_.point_mass ? 0.0f : float(weight(r));
    }
  }

  // A token of what is left; of the target where rounding alone left nothing.
  int64_t draw(const Noise& key) {
    if (untouched() || is_greedy(target_->scale())) return target_->draw(key);
    divide();
    const auto weights_of = [&](int64_t tile, float* weights) { tile_weights(tile, weights); };
    const int64_t drawn = target_->draw_below(key, weights_of, [&](int64_t tile) {
      if (!draft_.point_mass) prefetch(draft_.row, tile * kTile, kTile);
    });
    return drawn < 0 ? target_->draw(key) : drawn;
  }

 private:
  struct Rejected {
    int64_t token;
    double factor;  // 1 / taken, when it was rejected
  };

  std::vector<Rejected>::const_iterator find(int64_t token) const {
    return std::find_if(rejected_.begin(), rejected_.end(), [&](auto& r) { return r.token == token; });
  }
  bool was_rejected(int64_t token) const { return find(token) != rejected_.end(); }

  // The latest rejection is what the passes over tiles do.
  bool is_latest(const Rejected& r) const { return !draft_.point_mass && (replacement_ || r.factor == factor_); }

  double weight(const Rejected& r) const {
    const double factor = replacement_ ? factor_ : r.factor;
    return std::max(0.0, std::exp(target_->logprob(r.token)) - draft_.prob(r.token) / factor);
  }

  // What is left of one token, to be read relative to `mass_`.
  double weight(int64_t token) const {
    const auto r = find(token);
    if (draft_.point_mass) return r == rejected_.end() ? std::exp(target_->logprob(token)) : 0.0;
    return weight(r == rejected_.end() ? Rejected{token, factor_} : *r);
  }

  // The distribution a token was drawn from, given the siblings before it.
  double draft_prob(int64_t token) {
    const double prob = draft_.prob(token);
    if (draft_.point_mass || replacement_) return prob;
    const double rest = draft_left();
    return was_rejected(token) || rest == 0.0 ? 0.0 : prob / rest;
  }

  // What the siblings so far left of the draft's distribution: one minus what they took, summed anew where that would
  // have no digits left.
  double draft_left() {
    if (draft_.point_mass || replacement_) return 1.0;
    if (draft_known_) return draft_left_;
    draft_known_ = true;
    draft_left_ = 1.0 - drafted_;
    if (draft_left_ >= kLeastDifference) return draft_left_;
    draft_left_ = 0.0;
    float weights[kTile];
    for (int64_t tile = 0; tile < target_->tiles(); ++tile) {
      target_->kernels().token_probs(draft_.row, draft_.dist, tile, weights);
      for (const Rejected& r : rejected_)
        if (r.token / kTile == tile) weights[r.token % kTile] = 0.0f;
      draft_left_ += sum_of_tile(weights);
    }
    if (draft_left_ < kNothingLeft) draft_left_ = 0.0;
    return draft_left_;
  }

  // What rejected point masses left of the target: one minus what they took, where that has digits left.
  bool subtract(double& left) const {
    left = 1.0;
    for (const Rejected& r : rejected_) left -= std::exp(target_->logprob(r.token));
    return left >= kLeastDifference;
  }

  void divide() { divided_ = draft_.divided_by(factor_); }

  // Mass and path probability after the latest rejection.
  void update() {
    if (settled_) return;
    settled_ = true;
    divide();
    double mass;
    if (!draft_.point_mass || !subtract(mass))
      mass = target_->mass_below([&](int64_t tile, float* weights) { tile_weights(tile, weights); });
    const double left = path_prob_ * mass / mass_;
    if (path_prob_ < 1.0) path_prob_ = left > 0.0 ? left / (left + 1.0 - path_prob_) : 0.0;
    mass_ = mass;
  }

  const RowView* target_;
  DraftDistribution draft_;
  bool replacement_;
  double path_prob_;
  double factor_ = INFINITY;  // 1 / taken
  double mass_ = 1.0;         // of the residual
  double drafted_ = 0.0;      // draft's probability of the rejected tokens
  double draft_left_ = 1.0;   // what the rejected tokens leave of it
  bool settled_ = true, draft_known_ = true;
  Distribution divided_{};
  std::vector<Rejected> rejected_;
};

}  // namespace specdec
