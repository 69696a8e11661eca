// What verifying one request takes, be it a chain or a tree: its rows, its noise, and where its results go.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "distribution.h"
#include "residual.h"
#include "verify.h"

namespace specdec {

inline Row row_at(const Logits& logits, int64_t vocab, int64_t offset, const int32_t* columns = nullptr) {
  return {address(logits, offset), logits.dtype, vocab, columns, logits.width};
}

inline Sampling sampling_of(const SamplingParameters& all, int64_t request) {
  const SamplingParameters own = all.of(request);
  return {scale_of(own.temperature), {own.top_k, own.top_p, own.min_p}};
}

// The scratch of one thread, kept between calls.
struct Scratch {
  std::vector<TileSpace> targets;
  TileSpace draft;
};

inline Scratch& scratch() {
  static thread_local Scratch spaces;
  return spaces;
}

// The first arrival of the flat race, from the pieces' own.
inline int64_t flat_draw(const RowView& view, const Noise& noise, SharedPass& pass) {
  if (is_greedy(view.scale())) return view.argmax();
  std::vector<Arrival> first(view.pieces());
  pass.run(view.pieces(), [&](uint32_t piece) { first[piece] = view.race_piece(piece, noise); });
  return std::min_element(first.begin(), first.end(), [](auto& a, auto& b) { return a.time < b.time; })->index;
}

class Request {
 protected:
  // `places`: target rows that are held at a time. `first_row`: where the rows of the request begin, of the logits from
  // its own stride on, of the masks from their first.
  Request(const Verification& op, const Kernels& kernels, int64_t threads, int64_t request, int64_t places,
          int64_t first_logits, int64_t first_mask, SharedPass& pass)
      : op_(op),
        kernels_(kernels),
        threads_(threads),
        b_(request),
        first_logits_(first_logits),
        first_mask_(first_mask),
        pass_(pass),
        scratch_(scratch()),
        sampling_(sampling_of(op.sampling, request)),
        draft_scale_(op.draft_stats ? 1.0f : op.draft_scale(request)),
        adjustments_(adjustments_of(op.processing, request)) {
    // All places at once: growing later would move what the views hold on to.
    if (scratch_.targets.size() < size_t(places)) scratch_.targets.resize(size_t(places));
  }

  int64_t token_at(int64_t i) const { return op_.tokens[b_ * op_.token_strides[0] + i * op_.token_strides[1]]; }

  Noise noise(uint32_t purpose, int64_t row) const {
    return {uint64_t(op_.seed[b_]), uint64_t(op_.position[b_]), purpose | uint32_t(row) << 16};
  }

  // A 64-bit uniform in [0, 1), cut to the 53 bits of a double so that it cannot round to 1.
  double uniform(int64_t row) const {
    uint32_t words[4];
    kernels_.words(noise(kAccept, row), 0, 1, words);
    return double((uint64_t(words[0]) << 32 | words[1]) >> 11) * 0x1p-53;
  }

  // Target row i, whose penalties count `before` as output; its tiles kept in the given place of the scratch.
  RowView view(int64_t i, int64_t place, const Prefix& before) {
    TileSpace& space = scratch_.targets[size_t(place)];
    space.resize(tiles_of(op_.vocab));
    const Source source(target_row(i), mask_of(op_.processing, op_.vocab, first_mask_ + i), adjustments_, before);
    return RowView(kernels_, source, sampling_, threads_, space);
  }

  // Looks at target row i, and at the distribution of its drafts if there are any, `token` the first of them, else -1;
  // both rows in one shared pass where both are needed. A greedy target accepts its argmax and emits its argmax: there
  // no distribution of the draft matters.
  DraftDistribution score(RowView& target, int64_t i, int64_t token) {
    DraftDistribution drafted;
    if (token < 0 || op_.draft.data == nullptr || is_greedy(target.scale()) || is_greedy(draft_scale_)) {
      target.pass_all(pass_);
      drafted.point_mass = true;
      return drafted;
    }
    const int64_t offset = b_ * op_.draft.request_stride + i * op_.draft.row_stride;
    drafted.row = row_at(op_.draft, op_.vocab, offset, op_.target_to_draft);
    if (op_.draft_stats == nullptr) {
      scratch_.draft.resize(tiles_of(op_.vocab));
      RowView draft(kernels_, Source(drafted.row), {draft_scale_, {}}, threads_, scratch_.draft);
      RowView* const rows[] = {&target, &draft};
      const uint32_t pieces = target.pieces();
      pass_.run(2 * pieces, [&](uint32_t piece) { rows[piece / pieces]->pass(piece % pieces); });
      for (RowView* row : rows) row->finish();
      drafted.dist = draft.distribution();
      drafted.valid = draft.valid();
      return drafted;
    }
    const float* stats = op_.draft_stats + 3 * (b_ * op_.draft_rows + i);
    target.pass_all(pass_);
    drafted.point_mass = is_greedy(stats[0]);
    drafted.dist = {stats[0], stats[1], stats[2], 0.0f};
    return drafted;
  }

  // What the rule coupled draws at an absolute position.
  int64_t coupled_draw(const RowView& target, int64_t ahead) const {
    return flat_draw(target, {uint64_t(op_.seed[b_]), uint64_t(op_.position[b_] + ahead), kCoupled}, pass_);
  }

  // The next token of the text, of target row i; a row that is not usable has no log-probability.
  void write(const RowView& target, int64_t i, int64_t token) {
    const int64_t at = b_ * op_.rows + written_++;
    op_.out_tokens[at] = token;
    if (op_.out_logprobs == nullptr) return;
    op_.out_logprobs[at] = target.valid() ? float(target.logprob(token)) : NAN;
    scratch_.draft.resize(tiles_of(op_.vocab));
    RowView raw(kernels_, Source(target_row(i)), {1.0f, {}}, threads_, scratch_.draft);
    raw.pass_all(pass_);
    op_.out_raw_logprobs[at] = raw.valid() ? float(raw.logprob(token)) : NAN;
  }

  // The last token, and what goes with it.
  void finish(const RowView& target, int64_t i, int64_t emitted) {
    write(target, i, emitted);
    const int64_t begin = b_ * op_.rows + written_, end = (b_ + 1) * op_.rows;
    std::fill(op_.out_tokens + begin, op_.out_tokens + end, int64_t(-1));
    if (op_.out_logprobs) {
      std::fill(op_.out_logprobs + begin, op_.out_logprobs + end, NAN);
      std::fill(op_.out_raw_logprobs + begin, op_.out_raw_logprobs + end, NAN);
    }
    op_.out_accepted[b_] = int32_t(written_ - 1);
    op_.out_valid[b_] = valid_;
  }

  // The same where the target's row is not usable.
  void finish_unusable(const RowView& target, int64_t i) {
    valid_ = false;
    finish(target, i, target.largest_finite());
  }

  Row target_row(int64_t i) const {
    const int64_t offset = b_ * op_.target.request_stride + (first_logits_ + i) * op_.target.row_stride;
    return row_at(op_.target, op_.vocab, offset);
  }

  const Verification& op_;
  const Kernels& kernels_;
  const int64_t threads_, b_, first_logits_, first_mask_;
  SharedPass& pass_;
  Scratch& scratch_;
  const Sampling sampling_;
  const float draft_scale_;  // of drafts that came without stats
  const Adjustments adjustments_;
  int64_t written_ = 0;
  bool valid_ = true;
};

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerialElements = 1 << 14;

inline int64_t useful_threads(int64_t requests, int64_t vocab, int64_t threads) {
  return std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, requests * vocab / kSerialElements));
}

template <class F>
void each_request(int64_t requests, int64_t vocab, int64_t threads, RunOnThreads run, const F& request) {
  threads = useful_threads(requests, vocab, threads);
  ThreadGroup<F> group(requests, threads, request);
  if (threads == 1)
    group.join();
  else
    run(threads, [](void* context) { static_cast<ThreadGroup<F>*>(context)->join(); }, &group);
}

}  // namespace specdec
