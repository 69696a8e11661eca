#include "verify.h"

#include <algorithm>

#include "distribution.h"

namespace specdec {
namespace {

// A 64-bit uniform in [0, 1), cut to the 53 bits of a double so that it cannot round to 1.
double coin(const Kernels& kernels, Noise noise) {
  uint32_t words[4];
  kernels.words(noise, 0, 1, words);
  return double((uint64_t(words[0]) << 32 | words[1]) >> 11) * 0x1p-53;
}

Row row_at(const Logits& logits, int64_t vocab, int64_t offset) {
  const int64_t size = logits.dtype == DType::f32 ? 4 : 2;
  return {static_cast<const char*>(logits.data) + offset * size, logits.dtype, vocab};
}

Sampling sampling_of(const SamplingParameters& all, int64_t request) {
  if (all.each == nullptr) return {scale_of(all.temperature), {all.top_k, all.top_p, all.min_p}};
  const float* own = all.each + 4 * request;
  return {scale_of(own[0]), {int64_t(own[1]), own[2], own[3]}};
}

Edits edits_of(const Processing& all, int64_t request) {
  if (all.ids == nullptr) return {};
  const int64_t begin = request * all.edits;
  const float* penalties = all.penalties + 3 * request;
  return {all.edits,    all.ids + begin, all.counts + 2 * begin, all.bias + begin, penalties[0],
          penalties[1], penalties[2]};
}

const uint32_t* mask_of(const Processing& all, int64_t vocab, int64_t row) {
  return all.bitmask ? all.bitmask + row * ((vocab + 31) / 32) : nullptr;
}

// The scratch of one thread, kept between calls.
struct Scratch {
  std::vector<TileSpace> targets;
  TileSpace draft;
};

Scratch& scratch() {
  static thread_local Scratch spaces;
  return spaces;
}

// The first arrival of the flat race, from the pieces' own.
int64_t flat_draw(const RowView& view, const Noise& noise, SharedPass& pass) {
  if (is_greedy(view.scale())) return view.argmax();
  std::vector<Arrival> first(view.pieces());
  pass.run(view.pieces(), [&](uint32_t piece) { first[piece] = view.race_piece(piece, noise); });
  return std::min_element(first.begin(), first.end(), [](auto& a, auto& b) { return a.time < b.time; })->index;
}

// The law the draft token of one row was drawn from.
struct DraftLaw {
  bool point_mass = false;
  bool valid = true;
  double prob = 1.0;  // of the drafted token
  Row row{};
  Distribution dist{};

  // The same divided by `factor`: (factor * target - draft)+ is in proportion to (target - draft / factor)+.
  DraftLaw divided_by(double factor) const {
    DraftLaw law = *this;
    const double lse = double(dist.lse_high) + double(dist.lse_low) + std::log(factor);
    law.dist.lse_high = float(lse);
    law.dist.lse_low = float(lse - double(law.dist.lse_high));
    return law;
  }
};

class ChainRequest {
 public:
  ChainRequest(const VerifyChain& op, const Kernels& kernels, int64_t threads, int64_t request, SharedPass& pass)
      : op_(op),
        kernels_(kernels),
        threads_(threads),
        b_(request),
        pass_(pass),
        scratch_(scratch()),
        sampling_(sampling_of(op.sampling, request)),
        edits_(edits_of(op.processing, request)),
        drafted_(draft_length()) {
    // All places at once: growing later would move what the views hold on to.
    const size_t places = op.rule == Rule::block ? size_t(op.longest) + 1 : 1;
    if (scratch_.targets.size() < places) scratch_.targets.resize(places);
  }

  void run() {
    switch (op_.rule) {
      case Rule::token: token_rule(); break;
      case Rule::block: block_rule(); break;
      case Rule::coupled: coupled_rule(); break;
    }
    op_.out_counters[2 * b_] = int32_t(drafted_);
    op_.out_counters[2 * b_ + 1] = op_.independent ? count_independent() : -1;
  }

 private:
  void token_rule() {
    for (int64_t i = 0;; ++i) {
      RowView target = view(i, 0);
      const DraftLaw draft = score(target, i);
      if (!target.valid()) return stop_unusable(target, i);
      if (i == drafted_) return stop(target, i, target.draw(noise(kTarget, i)));
      if (!draft.valid) {
        // The draft is unusable, the target is not: the step ends here with a draw from the target.
        valid_ = false;
        return stop(target, i, target.draw(noise(kTarget, i)));
      }
      if (!accepts(target, draft, i)) return stop(target, i, residual_draw(target, draft, i));
      keep(target, i);
    }
  }

  // Sun et al., arXiv:2403.10444: the longest prefix that its coin keeps. The names follow algorithms.md, 2. Looked at
  // from the end, so that a residual's mass is only taken of rows behind the kept prefix.
  void block_rule() {
    std::vector<RowView> targets;
    std::vector<DraftLaw> drafts;
    std::vector<double> reach{1.0};
    targets.reserve(size_t(drafted_) + 1);
    for (int64_t i = 0; i < drafted_ && reach.back() > 0.0; ++i) {  // once 0, it stays 0
      targets.push_back(view(i, i));
      drafts.push_back(score(targets.back(), i));
      if (!targets.back().valid() || !drafts.back().valid) {
        valid_ = false;
        break;
      }
      // What the target excludes is never accepted, whatever the draft was declared to be: 0 / 0 is 0.
      const double prob = std::exp(targets.back().logprob(token_at(i)));
      reach.push_back(prob > 0.0 ? std::min(1.0, reach.back() * prob / drafts.back().prob) : 0.0);
    }
    const auto looked_at = int64_t(reach.size()) - 1;
    int64_t accepted = looked_at;
    for (; accepted > 0; --accepted) {
      const double u = coin(kernels_, noise(kAccept, accepted - 1)), a = reach[size_t(accepted)];
      if (accepted == looked_at ? u < a
                                : block_keeps(targets[size_t(accepted)], drafts[size_t(accepted)], a, u, accepted))
        break;
    }
    for (int64_t i = 0; i < accepted; ++i) keep(targets[size_t(i)], i);
    if (accepted == drafted_) {
      targets.push_back(view(accepted, accepted));
      score(targets.back(), accepted);
    }
    const RowView& target = targets[size_t(accepted)];
    if (!target.valid()) return stop_unusable(target, accepted);
    if (accepted == looked_at) return stop(target, accepted, target.draw(noise(kTarget, accepted)));
    const DraftLaw draft = drafts[size_t(accepted)].divided_by(reach[size_t(accepted)]);
    stop(target, accepted, residual_draw(target, draft, accepted));
  }

  // u < Z / (Z + 1 - a), Z = sum (a * target - draft)+, without taking more of the sum than the answer needs.
  bool block_keeps(const RowView& target, const DraftLaw& draft, double a, double u, int64_t i) const {
    if (a == 1.0) return true;
    const double needed = u * (1.0 - a) / (1.0 - u) / a;
    if (draft.point_mass) return 1.0 - std::exp(target.logprob(token_at(i))) > needed;
    const DraftLaw divided = draft.divided_by(a);
    return target.residual_exceeds(needed, divided.row, divided.dist);
  }

  // Daliri et al., arXiv:2408.07978: a draft is accepted iff it is what the target draws.
  void coupled_rule() {
    for (int64_t i = 0;; ++i) {
      RowView target = view(i, 0);
      pass_over(target);
      if (!target.valid()) return stop_unusable(target, i);
      const int64_t drawn = coupled_draw(target, i);
      if (i == drafted_ || drawn != token_at(i)) return stop(target, i, drawn);
      keep(target, i);
    }
  }

  int64_t coupled_draw(const RowView& target, int64_t i) const {
    return flat_draw(target, {uint64_t(op_.seed[b_]), uint64_t(op_.position[b_] + i), kCoupled}, pass_);
  }

  int32_t count_independent() {
    int32_t count = 0;
    for (int64_t i = 0; i < drafted_; ++i) {
      RowView target = view(i, 0);
      const DraftLaw draft = score(target, i);
      if (!target.valid()) continue;
      if (op_.rule == Rule::coupled)
        count += coupled_draw(target, i) == token_at(i);
      else
        count += draft.valid && accepts(target, draft, i);
    }
    return count;
  }

  int64_t token_at(int64_t i) const { return op_.tokens[b_ * op_.token_strides[0] + i * op_.token_strides[1]]; }

  int64_t draft_length() const {
    int64_t limit = op_.longest;
    if (op_.cu_rows) limit = std::min(limit, op_.cu_rows[b_ + 1] - op_.cu_rows[b_] - 1);
    if (op_.num_draft.data) limit = std::clamp<int64_t>(op_.num_draft[b_], 0, limit);
    for (int64_t i = 0; i < limit; ++i)
      if (token_at(i) < 0) return i;
    return limit;
  }

  Noise noise(uint32_t purpose, int64_t row) const {
    return {uint64_t(op_.seed[b_]), uint64_t(op_.position[b_]), purpose | uint32_t(row) << 16};
  }

  int64_t first_row() const { return op_.cu_rows ? op_.cu_rows[b_] : 0; }

  Row target_row(int64_t i) const {
    const int64_t offset = b_ * op_.target.request_stride + (first_row() + i) * op_.target.row_stride;
    return row_at(op_.target, op_.vocab, offset);
  }

  // Target row i, its tiles kept in the given place of the scratch.
  RowView view(int64_t i, int64_t place) {
    TileSpace& space = scratch_.targets[size_t(place)];
    space.resize(tiles_of(op_.vocab));
    const int64_t mask_row = op_.cu_rows ? first_row() + i : b_ * (op_.longest + 1) + i;
    const Prefix prefix{op_.tokens, b_ * op_.token_strides[0], op_.token_strides[1], i};
    const Source source(target_row(i), mask_of(op_.processing, op_.vocab, mask_row), edits_, prefix);
    return RowView(kernels_, source, sampling_, threads_, space);
  }

  void pass_over(RowView& target) {
    pass_.run(target.pieces(), [&](uint32_t piece) { target.pass(piece); });
    target.finish();
  }

  // Target row i and the law of its draft; both rows in one shared pass where both are needed. A greedy target accepts
  // its argmax and emits its argmax: there no law of the draft matters.
  DraftLaw score(RowView& target, int64_t i) {
    DraftLaw law;
    if (i == drafted_ || op_.draft.data == nullptr || is_greedy(target.scale())) {
      pass_over(target);
      law.point_mass = true;
      return law;
    }
    const float* stats = op_.draft_stats ? op_.draft_stats + 3 * (b_ * op_.longest + i) : nullptr;
    law.row = row_at(op_.draft, op_.vocab, b_ * op_.draft.request_stride + i * op_.draft.row_stride);
    const int64_t token = token_at(i);
    if (stats == nullptr) {
      scratch_.draft.resize(tiles_of(op_.vocab));
      RowView draft(kernels_, Source(law.row), {1.0f, {}}, threads_, scratch_.draft);
      const uint32_t pieces = target.pieces();
      pass_.run(2 * pieces, [&](uint32_t piece) { piece < pieces ? target.pass(piece) : draft.pass(piece - pieces); });
      target.finish();
      draft.finish();
      law.dist = draft.distribution();
      law.valid = draft.valid();
      law.prob = std::exp(draft.logprob(token));
      return law;
    }
    pass_over(target);
    law.point_mass = is_greedy(stats[0]);
    if (law.point_mass) return law;
    law.dist = {stats[0], stats[1], stats[2], 0.0f};
    const float logit = logit_of(law.row, token);
    law.prob = logit < stats[1] ? 0.0 : std::exp(double(stats[0]) * double(logit) - double(stats[2]));
    law.valid = std::isfinite(law.prob);
    return law;
  }

  // Strict: a token the target gives probability 0 is never accepted, even by coin 0.
  bool accepts(const RowView& target, const DraftLaw& draft, int64_t i) const {
    return coin(kernels_, noise(kAccept, i)) * draft.prob < std::exp(target.logprob(token_at(i)));
  }

  // From (target - draft)+; where rounding alone rejected and nothing is left of it, from the target.
  int64_t residual_draw(const RowView& target, const DraftLaw& draft, int64_t i) const {
    const Noise key = noise(kTarget, i);
    if (is_greedy(target.scale())) return target.draw(key);
    const int64_t token = token_at(i);
    const int64_t drawn = target.draw_below(key, [&](int64_t tile, float* weights) {
      if (draft.point_mass) {
        target.tile_probs(tile, weights);
        if (tile == token / kTile) weights[token % kTile] = 0.0f;
      } else {
        target.tile_residuals(draft.row, draft.dist, tile, weights);
      }
    });
    return drawn < 0 ? target.draw(key) : drawn;
  }

  // Draft i is part of the text.
  void keep(const RowView& target, int64_t i) { write(i, token_at(i), target.logprob(token_at(i))); }

  void stop(const RowView& target, int64_t i, int64_t emitted) { finish(i, emitted, target.logprob(emitted)); }

  void stop_unusable(const RowView& target, int64_t i) {
    valid_ = false;
    finish(i, target.largest_finite(), NAN);
  }

  void write(int64_t i, int64_t token, double logprob) {
    const int64_t at = b_ * (op_.longest + 1) + i;
    op_.out_tokens[at] = token;
    if (op_.out_logprobs == nullptr) return;
    op_.out_logprobs[at] = float(logprob);
    scratch_.draft.resize(tiles_of(op_.vocab));
    RowView raw(kernels_, Source(target_row(i)), {1.0f, {}}, threads_, scratch_.draft);
    pass_over(raw);
    op_.out_raw_logprobs[at] = raw.valid() ? float(raw.logprob(token)) : NAN;
  }

  void finish(int64_t accepted, int64_t emitted, double logprob) {
    write(accepted, emitted, logprob);
    const int64_t begin = b_ * (op_.longest + 1) + accepted + 1, end = (b_ + 1) * (op_.longest + 1);
    std::fill(op_.out_tokens + begin, op_.out_tokens + end, int64_t(-1));
    if (op_.out_logprobs) {
      std::fill(op_.out_logprobs + begin, op_.out_logprobs + end, NAN);
      std::fill(op_.out_raw_logprobs + begin, op_.out_raw_logprobs + end, NAN);
    }
    op_.out_accepted[b_] = int32_t(accepted);
    op_.out_valid[b_] = valid_;
  }

  const VerifyChain& op_;
  const Kernels& kernels_;
  const int64_t threads_, b_;
  SharedPass& pass_;
  Scratch& scratch_;
  const Sampling sampling_;
  const Edits edits_;
  const int64_t drafted_;
  bool valid_ = true;
};

void sample_row(const Sample& op, const Kernels& kernels, int64_t threads, int64_t r, SharedPass& pass) {
  const Source source(row_at(op.logits, op.vocab, r * op.logits.row_stride), mask_of(op.processing, op.vocab, r),
                      edits_of(op.processing, r));
  TileSpace& space = scratch().draft;
  space.resize(tiles_of(op.vocab));
  RowView view(kernels, source, sampling_of(op.sampling, r), threads, space);
  pass.run(view.pieces(), [&](uint32_t piece) { view.pass(piece); });
  view.finish();
  float* stats = op.out_stats + 3 * r;
  if (!view.valid()) {
    op.out_tokens[r] = view.largest_finite();
    op.out_logprobs[r] = NAN;
    std::fill(stats, stats + 3, NAN);
    return;
  }
  const auto seed = uint64_t(op.seed[r]);
  if (op.coupled)
    op.out_tokens[r] = flat_draw(view, {seed, uint64_t(op.position[r] + op.row[r]), kCoupled}, pass);
  else
    op.out_tokens[r] = view.draw({seed, uint64_t(op.position[r]), kDraft | uint32_t(op.row[r]) << 16});
  op.out_logprobs[r] = float(view.logprob(op.out_tokens[r]));
  stats[0] = view.scale();
  stats[1] = view.cutoff();
  stats[2] = float(view.logsumexp());
}

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerialElements = 1 << 14;

template <class F>
void each_request(int64_t requests, int64_t vocab, int64_t threads, RunOnThreads run, const F& request) {
  threads = std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, requests * vocab / kSerialElements));
  Team<F> team(requests, threads, request);
  if (threads == 1)
    team.join();
  else
    run(threads, [](void* context) { static_cast<Team<F>*>(context)->join(); }, &team);
}

}  // namespace

std::optional<std::pair<int64_t, int64_t>> find_bad_token(const VerifyChain& op) {
  for (int64_t b = 0; b < op.batch; ++b) {
    int64_t limit = op.longest;
    if (op.cu_rows) limit = std::min(limit, op.cu_rows[b + 1] - op.cu_rows[b] - 1);
    if (op.num_draft.data) limit = std::clamp<int64_t>(op.num_draft[b], 0, limit);
    for (int64_t i = 0; i < limit; ++i) {
      const int64_t token = op.tokens[b * op.token_strides[0] + i * op.token_strides[1]];
      if (token == -1) break;
      if (token < -1 || token >= op.vocab) return std::pair{b, i};
    }
  }
  return std::nullopt;
}

void verify_chain(const VerifyChain& op, int64_t threads, RunOnThreads run) {
  const Kernels& table = *kernels();
  each_request(op.batch, op.vocab, threads, run,
               [&](int64_t b, SharedPass& pass) { ChainRequest(op, table, threads, b, pass).run(); });
}

void sample(const Sample& op, int64_t threads, RunOnThreads run) {
  const Kernels& table = *kernels();
  each_request(op.rows, op.vocab, threads, run,
               [&](int64_t r, SharedPass& pass) { sample_row(op, table, threads, r, pass); });
}

}  // namespace specdec
