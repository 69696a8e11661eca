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

Row row_of(const Logits& logits, int64_t vocab, int64_t request, int64_t index) {
  const int64_t offset = request * logits.request_stride + index * logits.row_stride;
  const int64_t size = logits.dtype == DType::f32 ? 4 : 2;
  return {static_cast<const char*>(logits.data) + offset * size, logits.dtype, vocab};
}

// The scratch of one thread, kept between calls.
struct Scratch {
  TileSpace target, draft;
};

Scratch& scratch(int64_t tiles) {
  static thread_local Scratch spaces;
  spaces.target.resize(tiles);
  spaces.draft.resize(tiles);
  return spaces;
}

// The law the draft token of one row was drawn from.
struct DraftLaw {
  bool point_mass = false;
  bool valid = true;
  double prob = 1.0;  // of the drafted token
  Row row{};
  Distribution dist{};
};

class ChainRequest {
 public:
  ChainRequest(const VerifyChain& op, const Kernels& kernels, int64_t threads, int64_t request, SharedPass& pass)
      : op_(op),
        kernels_(kernels),
        threads_(threads),
        b_(request),
        pass_(pass),
        scratch_(scratch(tiles_of(op.vocab))) {}

  void run() {
    const float scale = scale_of(op_.temperatures ? op_.temperatures[b_] : op_.temperature);
    const int64_t drafted = draft_length();
    int64_t i = 0;
    int64_t emitted = -1;
    for (; emitted < 0; ++i) {
      RowView target(kernels_, row_of(op_.target, op_.vocab, b_, i), scale, threads_, scratch_.target);
      const bool last = i == drafted;
      // A greedy target accepts its argmax and emits its argmax: no law of the draft matters.
      const bool needs_draft = !last && !is_greedy(scale);
      DraftLaw draft = needs_draft ? score_with_draft(target, i) : score(target);
      if (!target.valid()) {
        valid_ = false;
        emitted = target.largest_finite();
      } else if (last) {
        emitted = target.draw(noise(kTarget, i));
      } else if (!draft.valid) {
        // The draft is unusable, the target is not: the step ends here with a draw from the target.
        valid_ = false;
        emitted = target.draw(noise(kTarget, i));
      } else if (const int64_t token = token_at(i); accepts(target, draft, token, i)) {
        op_.out_tokens[b_ * (op_.longest + 1) + i] = token;
      } else {
        emitted = residual_draw(target, draft, token, i);
      }
    }
    finish(i - 1, emitted);
  }

 private:
  int64_t token_at(int64_t i) const { return op_.tokens[b_ * op_.token_strides[0] + i * op_.token_strides[1]]; }

  int64_t draft_length() const {
    int64_t limit = op_.longest;
    if (op_.num_draft.data) limit = std::clamp<int64_t>(op_.num_draft[b_], 0, limit);
    for (int64_t i = 0; i < limit; ++i)
      if (token_at(i) < 0) return i;
    return limit;
  }

  Noise noise(uint32_t purpose, int64_t row) const {
    return {uint64_t(op_.seed[b_]), uint64_t(op_.position[b_]), purpose | uint32_t(row) << 16};
  }

  DraftLaw score(RowView& target) {
    pass_.run(target.pieces(), [&](uint32_t piece) { target.pass(piece); });
    target.finish();
    return {};
  }

  // Target row i and the probability of its draft token; both rows in one shared pass where both are needed.
  DraftLaw score_with_draft(RowView& target, int64_t i) {
    DraftLaw law;
    if (op_.draft.data == nullptr) {
      score(target);
      law.point_mass = true;
      return law;
    }
    const float* stats = op_.draft_stats ? op_.draft_stats + 3 * (b_ * op_.longest + i) : nullptr;
    law.row = row_of(op_.draft, op_.vocab, b_, i);
    const int64_t token = token_at(i);
    if (stats == nullptr) {
      RowView draft(kernels_, law.row, 1.0f, threads_, scratch_.draft);
      const uint32_t pieces = target.pieces();
      pass_.run(2 * pieces, [&](uint32_t piece) { piece < pieces ? target.pass(piece) : draft.pass(piece - pieces); });
      target.finish();
      draft.finish();
      law.dist = draft.distribution();
      law.valid = draft.valid();
      law.prob = std::exp(draft.logprob(token));
      return law;
    }
    score(target);
    law.point_mass = is_greedy(stats[0]);
    if (law.point_mass) return law;
    law.dist = {stats[0], stats[1], stats[2], 0.0f};
    const float logit = RowView(kernels_, law.row, stats[0], threads_, scratch_.draft).logit(token);
    law.prob = logit < stats[1] ? 0.0 : std::exp(double(stats[0]) * double(logit) - double(stats[2]));
    law.valid = std::isfinite(law.prob);
    return law;
  }

  // Strict: a token the target gives probability 0 is never accepted, even by coin 0.
  bool accepts(const RowView& target, const DraftLaw& draft, int64_t token, int64_t i) const {
    return coin(kernels_, noise(kAccept, i)) * draft.prob < std::exp(target.logprob(token));
  }

  // From (target - draft)+; where rounding alone rejected and nothing is left of it, from the target.
  int64_t residual_draw(const RowView& target, const DraftLaw& draft, int64_t token, int64_t i) const {
    const Noise key = noise(kTarget, i);
    if (is_greedy(target.scale())) return target.draw(key);
    const Distribution dist = target.distribution();
    const int64_t drawn = target.draw_below(key, [&](int64_t tile, float* weights) {
      if (draft.point_mass) {
        kernels_.token_probs(target.row(), dist, tile, weights);
        if (tile == token / kTile) weights[token % kTile] = 0.0f;
      } else {
        kernels_.token_residuals(target.row(), dist, draft.row, draft.dist, tile, weights);
      }
    });
    return drawn < 0 ? target.draw(key) : drawn;
  }

  void finish(int64_t accepted, int64_t emitted) {
    int64_t* out = op_.out_tokens + b_ * (op_.longest + 1);
    out[accepted] = emitted;
    std::fill(out + accepted + 1, out + op_.longest + 1, int64_t(-1));
    op_.out_accepted[b_] = int32_t(accepted);
    op_.out_valid[b_] = valid_;
  }

  const VerifyChain& op_;
  const Kernels& kernels_;
  const int64_t threads_, b_;
  SharedPass& pass_;
  Scratch& scratch_;
  bool valid_ = true;
};

void sample_row(const Sample& op, const Kernels& kernels, int64_t threads, int64_t r, SharedPass& pass) {
  const float scale = scale_of(op.temperatures ? op.temperatures[r] : op.temperature);
  RowView view(kernels, row_of(op.logits, op.vocab, 0, r), scale, threads, scratch(tiles_of(op.vocab)).target);
  pass.run(view.pieces(), [&](uint32_t piece) { view.pass(piece); });
  view.finish();
  float* stats = op.out_stats + 3 * r;
  if (!view.valid()) {
    op.out_tokens[r] = view.largest_finite();
    op.out_logprobs[r] = NAN;
    std::fill(stats, stats + 3, NAN);
    return;
  }
  const Noise key{uint64_t(op.seed[r]), uint64_t(op.position[r]), kDraft | uint32_t(op.row[r]) << 16};
  op.out_tokens[r] = view.draw(key);
  op.out_logprobs[r] = float(view.logprob(op.out_tokens[r]));
  stats[0] = scale;
  stats[1] = is_greedy(scale) ? view.max() : -INFINITY;
  stats[2] = is_greedy(scale) ? 0.0f : float(view.logsumexp());
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
