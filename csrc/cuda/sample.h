// `sample`, `sample_children` and `noise_words`.
#pragma once

#include "workspace.h"

namespace specdec::cuda {

// `noise_words`: one counter.
SPECDEC_DEVICE void noise_program(const NoiseWords& op, int64_t index) {
  if (index >= op.rows * op.counters) return;
  const int64_t r = index / op.counters, counter = index % op.counters;
  const Words words = philox({uint64_t(op.seed[r]), uint64_t(op.position[r]), op.tag}, uint32_t(op.first + counter));
  for (int word = 0; word < 4; ++word) op.out[4 * index + word] = int64_t(words.w[word]);
}

// One row: program = row * slices + slice.
template <bool P>
class RowProgram {
 public:
  SPECDEC_DEVICE RowProgram(const Team& team, const Sample& op, const Workspace& work, int64_t program)
      : team_(team), op_(op), work_(work), r_(program / work.slices), part_(program % work.slices) {
    sampling_ = sampling_of(op.sampling, r_);
    seed_ = uint64_t(op.seed[r_]), position_ = uint64_t(op.position[r_]), row_ = uint64_t(op.row[r_]);
    rows_.logits = address(op.logits, r_ * op.logits.row_stride);
    rows_.dtype = op.logits.dtype, rows_.vocab = op.vocab;
    if constexpr (P) rows_.mask = mask_of(op.processing, op.vocab, r_);
    if constexpr (P) rows_.edits = edits_of(op.processing, r_);
  }

  SPECDEC_DEVICE void sample() {
    if (!measured(true)) return;
    int64_t token = law_.argmax;
    if (token < 0)
      token = op_.coupled ? flat_race<P>(team_, rows_, 0, law_, seed_, position_ + row_)
                          : draw_from_row<P>(team_, rows_, 0, law_, noise(0));
    write(op_.out_tokens + r_, op_.out_logprobs + r_, token);
  }

  // Fewer than `count` where the law has no more to give.
  SPECDEC_DEVICE void sample_children(int64_t count, Children how) {
    if (!measured(false)) return;
    int64_t* tokens = op_.out_tokens + r_ * count;
    Arrived last;  // in order: by falling logit, or by arrival
    last.time = -INFINITY, last.id = -1;
    for (int64_t child = 0; child < count; ++child) {
      int64_t drawn = kNobody;
      if (law_.argmax >= 0) {
        // A point mass has one child, unless it is drawn again; a row that is not valid has one.
        if (child == 0 || (how == Children::iid && valid_)) drawn = law_.argmax;
      } else if (how == Children::top || how == Children::race) {
        if (last.id != kNobody) last = next_best(last, how == Children::race);
        drawn = last.id;
      } else {
        team_.sync();  // the tokens before were written by one thread
        drawn = draw_without(tokens, how == Children::iid ? 0 : child, noise(child));
      }
      write(tokens + child, op_.out_logprobs + r_ * count + child, drawn);
    }
  }

 private:
  SPECDEC_DEVICE Noise noise(int64_t child) const {
    return {seed_, position_, kDraft | uint32_t(row_ + uint64_t(child)) << 16};
  }

  // Measures this team's slice; whether it is the last to, and goes on. Then the law is known, and written.
  SPECDEC_DEVICE bool measured(bool race) {
    const Table table = work_.table(r_);
    measure_slice<P>(team_, rows_, 0, sampling_.finite_scale(), part_, work_.slices, table);
    if (!team_.last_to_arrive(work_.counters + r_, int32_t(work_.slices - 1))) return false;
    const LawOfRow found = law_of<P>(team_, rows_, 0, sampling_, table, noise(0), race);
    law_ = found.law, valid_ = found.valid;
    if (team_.rank() == 0) {
      work_.counters[r_] = 0;
      op_.out_stats[3 * r_] = valid_ ? law_.scale : NAN;
      op_.out_stats[3 * r_ + 1] = valid_ ? law_.cutoff : NAN;
      op_.out_stats[3 * r_ + 2] = valid_ ? float(law_.logsumexp) : NAN;
    }
    return true;
  }

  SPECDEC_DEVICE void write(int64_t* token, float* logprob, int64_t drawn) const {
    if (team_.rank() != 0) return;
    *token = drawn == kNobody ? -1 : drawn;
    *logprob = drawn != kNobody && valid_ ? float(log_prob<P>(rows_, 0, law_, drawn)) : NAN;
  }

  // What comes behind `last` when ids are ordered by falling logit, or by arrival in the flat race.
  SPECDEC_PASS Arrived next_best(const Arrived& last, bool race) const {
    const Noise noise{seed_, position_ + row_, kCoupled | kTokenRace << 8};
    const Probabilities probability(law_);
    Arrived best;
    for_tiles<1>(team_, 0, tiles_of(rows_.vocab), [&](int64_t tile, bool there) {
      const int64_t ids = there ? own_ids(team_, tile) : rows_.vocab;
      float x[kElements];
      load<P>(rows_, 0, ids, x);
      for (int e = 0; e < kElements; ++e) {
        const float weight = race ? probability(x[e]) : 0.0f;
        const bool takes_part = race ? weight >= float(kNothingLeft) : x[e] >= law_.cutoff && x[e] > -INFINITY;
        if (!takes_part) continue;
        const Arrived here{race ? exponential(noise, ids + e) / weight : -x[e], 0.0f, ids + e};
        if (here.time > last.time || (here.time == last.time && here.id > last.id)) best = Earlier()(best, here);
      }
    });
    return team_.reduce(best, Earlier());
  }

  SPECDEC_DEVICE static bool is_taken(const int64_t* tokens, int64_t taken, int64_t id) {
    for (int64_t index = 0; index < taken; ++index)
      if (tokens[index] == id) return true;
    return false;
  }

  // A token by the two-level race, none of the first `taken`; kNobody where they left nothing.
  SPECDEC_PASS int64_t draw_without(const int64_t* tokens, int64_t taken, const Noise& noise) const {
    const Probabilities probability(law_);
    Arrived first;
    double share = 0.0;
    for_tiles<1>(team_, 0, tiles_of(rows_.vocab), [&](int64_t tile, bool there) {
      const int64_t ids = there ? own_ids(team_, tile) : rows_.vocab;
      float x[kElements], sum = 0.0f;
      load<P>(rows_, 0, ids, x);
      for (int e = 0; e < kElements; ++e) sum += is_taken(tokens, taken, ids + e) ? 0.0f : probability(x[e]);
      sum = team_.in_group(sum, Plus());
      if (team_.rank() % kGroup != 0) return;
      share += double(sum);
      take_part(first, exponential(noise, tile), sum, tile);
    });
    share = team_.reduce(share, Plus());
    const int64_t tile = team_.reduce(first, Earlier()).id;
    if (share < kNothingLeft || tile == kNobody) return kNobody;
    return draw_inside(team_, tile, rows_.vocab, noise, [&](int64_t id) {
      return is_taken(tokens, taken, id) ? 0.0f : probability(logit<P>(rows_, 0, id));
    });
  }

  const Team& team_;
  const Sample& op_;
  const Workspace& work_;
  const int64_t r_, part_;
  Sampling sampling_;
  uint64_t seed_, position_, row_;
  Rows rows_;
  Law law_;
  bool valid_ = false;
};

}  // namespace specdec::cuda
