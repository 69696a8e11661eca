// Rules for a chain of drafts.
#include <algorithm>
#include <bit>
#include <cmath>
#include <deque>
#include <thread>
#include <vector>

#include "request.h"

namespace specdec {
namespace {

int64_t first_row(const VerifyChain& op, int64_t request) { return op.cu_rows ? op.cu_rows[request] : 0; }

class ChainRequest : Request {
 public:
  ChainRequest(const VerifyChain& op, const Kernels& kernels, int64_t threads, int64_t b, SharedPass& pass)
      : Request(op.common, kernels, threads, b, op.rule == Rule::block ? op.common.rows : 1, first_row(op, b),
                op.cu_rows ? op.cu_rows[b] : b * op.common.rows, pass),
        chain_(op) {
    const int64_t room = op.room(b);
    drafts_.reserve(size_t(room));
    for (int64_t i = 0; i < room && token_at(i) >= 0; ++i) drafts_.push_back(token_at(i));
  }

  // Whether this thread takes part.
  bool join(Lockstep& lockstep, bool is_caller) {
    lockstep_ = &lockstep;
    if (!lockstep.join(share_, is_caller)) return false;
    // Where it begins is on its way while it looks at what else there is.
    const int64_t begin = std::countr_zero(share_.pieces) * piece_tiles(tiles_of(op_.vocab), threads_);
    prefetch(target_row(0), begin * kTile, kTile);
    return true;
  }

  // Whether this is the thread that writes results.
  bool leads() const { return lockstep_ == nullptr || share_.leads(); }

  void run() {
    switch (chain_.rule) {
      case Rule::token: token_rule(); break;
      case Rule::block: block_rule(); break;
      case Rule::coupled: coupled_rule(); break;
    }
    if (!leads()) return;
    chain_.out_counters[2 * b_] = int32_t(drafted());
    chain_.out_counters[2 * b_ + 1] = chain_.independent ? count_independent() : -1;
  }

 private:
  int64_t drafted() const { return int64_t(drafts_.size()); }
  int64_t draft_at(int64_t i) const { return i < drafted() ? drafts_[size_t(i)] : -1; }

  RowView view_of(int64_t i, int64_t place) {
    Outlook outlook{draft_at(i), large_, i < drafted() ? target_row(i + 1).logits : nullptr};
    // What the rule coupled draws depends neither on drafts nor on where a step began, not even in its last digit.
    if (chain_.rule == Rule::coupled) outlook = {.next = outlook.next};
    return view(i, place, {drafts_.data(), i}, outlook);
  }

  void token_rule() {
    for (int64_t i = 0;; ++i) {
      RowView target = view_of(i, 0);
      const int64_t token = draft_at(i);
      const double u = token >= 0 ? coin(i) : 0.0;  // before the pass, whose waiting for memory hides it
      const DraftLaw draft = score(target, i, token);
      Residual left(kernels_, target, draft, pass_, false);
      const bool usable = target.valid() && token >= 0 && draft.usable(token);
      if (usable && left.accepts(token, u)) {
        if (leads()) write(target, i, token);
        continue;
      }
      if (!leads()) return;
      if (!target.valid()) return finish_unusable(target, i);
      if (usable)
        left.reject(token);
      else
        valid_ = token < 0;  // the step ends here with a draw from the target
      return finish(target, i, left.draw(noise(kTarget, i)));
    }
  }

  // Sun et al., arXiv:2403.10444: the longest prefix that its coin keeps. Looked at from the end, so that a residual's
  // mass is only taken of rows behind the kept prefix.
  void block_rule() {
    std::deque<RowView> targets;  // residuals hold on to them
    std::deque<Residual> left;
    double reach = 1.0;
    const auto look = [&](int64_t token) {
      const auto i = int64_t(left.size());
      targets.push_back(view_of(i, i));
      const DraftLaw draft = score(targets.back(), i, token);
      left.emplace_back(kernels_, targets.back(), draft, pass_, false, reach);
      return draft;
    };
    int64_t looked_at = 0;
    for (; looked_at < drafted() && reach > 0.0; ++looked_at) {  // once 0, it stays 0
      const int64_t token = drafts_[size_t(looked_at)];
      const DraftLaw draft = look(token);
      if (!targets.back().valid() || !draft.usable(token)) {
        valid_ = false;
        break;
      }
      reach = left.back().reach_of(token);
      left.back().reject(token);
    }
    int64_t accepted = looked_at;
    for (; accepted > 0; --accepted) {
      const double u = coin(accepted - 1);
      if (accepted == looked_at ? u < reach : left[size_t(accepted)].reached(u)) break;
    }
    if (accepted == int64_t(left.size())) look(-1);
    for (int64_t i = 0; i < accepted; ++i) write(targets[size_t(i)], i, drafts_[size_t(i)]);
    const RowView& target = targets[size_t(accepted)];
    if (!target.valid()) return finish_unusable(target, accepted);
    finish(target, accepted, left[size_t(accepted)].draw(noise(kTarget, accepted)));
  }

  // Daliri et al., arXiv:2408.07978: a draft is accepted iff it is what the target draws.
  void coupled_rule() {
    for (int64_t i = 0;; ++i) {
      RowView target = view_of(i, 0);
      pass_over(target);
      if (!target.valid()) return finish_unusable(target, i);
      const int64_t drawn = coupled_draw(target, i);
      if (i == drafted() || drawn != drafts_[size_t(i)]) return finish(target, i, drawn);
      write(target, i, drawn);
    }
  }

  int32_t count_independent() {
    int32_t count = 0;
    large_ = NAN;  // as in the beginning
    for (int64_t i = 0; i < drafted(); ++i) {
      const int64_t token = drafts_[size_t(i)];
      RowView target = view_of(i, 0);
      const DraftLaw draft = score(target, i, token);
      if (!target.valid()) continue;
      if (chain_.rule == Rule::coupled)
        count += coupled_draw(target, i) == token;
      else
        count += draft.usable(token) && Residual(kernels_, target, draft, pass_, false).accepts(token, coin(i));
    }
    return count;
  }

  const VerifyChain& chain_;
  std::vector<int64_t> drafts_;
};

// A single request of which no row takes more than one pass; whether it was one.
bool verify_in_lockstep(const VerifyChain& op, const Kernels& kernels, int64_t threads, RunOnThreads run) {
  const Verification& all = op.common;
  const bool a_pass_a_row = op.rule == Rule::token && !op.independent && all.out_logprobs == nullptr &&
                            (all.draft.data == nullptr || all.draft_stats != nullptr);
  if (all.batch != 1 || !a_pass_a_row || sampling_of(all.sampling, 0).filters.any()) return false;
  const int64_t tiles = tiles_of(all.vocab), pieces = pieces_of(tiles, piece_tiles(tiles, threads));
  const int64_t several = useful_threads(1, all.vocab, threads);
  if (several == 1 || pieces == 1 || pieces > Lockstep::kMostPieces) return false;
  if (op.room(0) > 0 && all.tokens[0] >= 0)  // while threads come
    prefetch(row_at(all.target, all.vocab, 0), all.tokens[0], 1);
  Lockstep lockstep(pieces, tiles, scratch().lockstep);
  const auto caller = std::this_thread::get_id();
  auto member = [&] {
    SharedPass nobody_helps;
    ChainRequest request(op, kernels, threads, 0, nobody_helps);
    const bool is_caller = std::this_thread::get_id() == caller;
    if (!request.join(lockstep, is_caller)) return;
    request.run();
    if (is_caller && !request.leads() && op.aside != nullptr) op.aside->run();
  };
  run(several, [](void* context) { (*static_cast<decltype(member)*>(context))(); }, &member);
  return true;
}

}  // namespace

bool ids_in_range(const VerifyChain& op) {
  const Verification& all = op.common;
  for (int64_t b = 0; b < all.batch; ++b) {
    const int64_t limit = op.room(b);
    for (int64_t i = 0; i < limit; ++i) {
      const int64_t token = all.tokens[b * all.token_strides[0] + i * all.token_strides[1]];
      if (token == -1) break;
      if (token < -1 || token >= all.vocab) return false;
    }
  }
  return true;
}

void verify_chain(const VerifyChain& op, int64_t threads, RunOnThreads run) {
  const Kernels& table = *kernels();
  if (verify_in_lockstep(op, table, threads, run)) return;
  each_request(op.common.batch, op.common.vocab, threads, run,
               [&](int64_t b, SharedPass& pass) { ChainRequest(op, table, threads, b, pass).run(); });
}

}  // namespace specdec
