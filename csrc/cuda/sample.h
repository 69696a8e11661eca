// `sample`, `sample_children` and `noise_words`.
#pragma once

#include "request.h"

namespace specdec::cuda {

// `noise_words`: one counter.
SPECDEC_DEVICE void noise_program(const NoiseWords& op, int64_t index) {
  if (index >= op.rows * op.counters) return;
  const int64_t r = index / op.counters, counter = index % op.counters;
  const Words words = philox({uint64_t(op.seed[r]), uint64_t(op.position[r]), op.tag}, uint32_t(op.first + counter));
  for (int word = 0; word < 4; ++word) op.out[4 * index + word] = int64_t(words.w[word]);
}

// One row. kCoupled: it is measured with the race of all ids.
template <class T>
class RowProgram {
 public:
  SPECDEC_DEVICE RowProgram(const Team& team, const Sample& op, const Workspace& work, const Part& part)
      : team_(team),
        op_(op),
        work_(work),
        r_(part.request),
        slice_(part.slice),
        vocab_(int(op.vocab)),
        sampling_(sampling_of(op.sampling, r_)),
        table_(work.table(r_)),
        seed_(uint64_t(given(op.seed + r_))),
        position_(uint64_t(given(op.position + r_))),
        row_(uint64_t(given(op.row + r_))),
        rows_(rows_of<T>(team, kTargetRows, op.logits, r_ * op.logits.row_stride, op.vocab)) {
    if constexpr (std::is_same_v<T, Mixed>) {
      if (team_.rank() == 0) {
        ProcessedRows& rows = team_.memory().rows[kTargetRows] =
            plain_rows(op.logits, r_ * op.logits.row_stride, op.vocab);
        rows.columns = {op.target_to_draft, int(op.logits.width)};
        rows.mask = mask_of(op.processing, op.vocab, r_), rows.adjustments = adjustments_of(op.processing, r_);
      }
      team_.sync();
    }
  }

  template <bool kWithRace>
  SPECDEC_DEVICE void sample() {
    if (!measured<kWithRace>()) return;
    int token = d_.argmax;
    if (token < 0)
      token = kWithRace ? flat_race(team_, rows_, 0, d_, table_, coupled_noise())
                        : draw_from_row(team_, rows_, 0, d_, table_, noise(0));
    write(op_.out_tokens + r_, op_.out_logprobs + r_, token);
  }

  // Fewer than `count` where the distribution has no more to give.
  SPECDEC_DEVICE void sample_children(int count, Children how) {
    if (!measured<false>()) return;
    int64_t* tokens = op_.out_tokens + int64_t(r_) * count;
    Arrived last;  // in order: by falling logit, or by arrival
    last.time = -INFINITY, last.id = -1;
    for (int child = 0; child < count; ++child) {
      int drawn = kNobody;
      if (d_.argmax >= 0) {
        // A point mass has one child, unless it is drawn again; a row that is not valid has one.
        if (child == 0 || (how == Children::iid && valid_)) drawn = d_.argmax;
      } else if (how == Children::top || how == Children::race) {
        if (last.id != kNobody) last = next_best(last, how == Children::race);
        drawn = last.id;
      } else {
        team_.sync();  // the tokens before were written by one thread
        drawn = draw_without(tokens, how == Children::iid ? 0 : child, noise(child));
      }
      write(tokens + child, op_.out_logprobs + int64_t(r_) * count + child, drawn);
    }
  }

 private:
  SPECDEC_DEVICE Noise noise(int child) const {
    return {seed_, position_, kDraft | uint32_t(row_ + uint64_t(child)) << 16};
  }
  SPECDEC_DEVICE Noise coupled_noise() const { return {seed_, position_ + row_, kCoupled | kTokenRace << 8}; }

  // Measures this block's slice; whether it is the last to, and goes on. Then the distribution is known, and written.
  template <bool kWithRace>
  SPECDEC_DEVICE bool measured() {
    measure_slice<kWithRace>(team_, rows_, 0, sampling_.measure(vocab_), coupled_noise(), work_, slice_, table_, [] {});
    if (when_all_came(team_, work_.counters + r_, work_.slices, [] { return 1; }) == 0) return false;
    valid_ = distribution_of(team_, rows_, 0, sampling_, table_, d_);
    if (team_.rank() == 0) {
      op_.out_stats[3 * r_] = valid_ ? d_.scale : NAN;
      op_.out_stats[3 * r_ + 1] = valid_ ? d_.cutoff : NAN;
      op_.out_stats[3 * r_ + 2] = valid_ ? d_.logsumexp() : NAN;
    }
    return true;
  }

  SPECDEC_DEVICE void write(int64_t* token, float* logprob, int drawn) const {
    if (team_.rank() != 0) return;
    *token = drawn == kNobody ? -1 : drawn;
    *logprob = drawn != kNobody && valid_ ? float(d_.log_prob(rows_.logit(0, drawn), drawn)) : NAN;
  }

  // What comes behind `last` when ids are ordered by falling logit, or by arrival in the flat race.
  SPECDEC_DEVICE Arrived next_best(const Arrived& last, bool race) const {
    const Probabilities probability(d_);
    Arrived best;
    for_ids(team_, rows_, 0, [&](int id, float x) {
      const float weight = race ? probability(x) : 0.0f;
      const bool takes_part = race ? weight >= float(kNothingLeft) : x >= d_.cutoff && x > -INFINITY;
      if (!takes_part) return;
      const Arrived here{race ? quotient(exponential(philox(coupled_noise(), uint32_t(id / 4)).w[id % 4]), weight) : -x,
                         id};
      if (here.time > last.time || (here.time == last.time && here.id > last.id)) best = Earlier()(best, here);
    });
    return team_.reduce(best, Earlier());
  }

  SPECDEC_DEVICE static bool is_taken(const int64_t* tokens, int taken, int id) {
    for (int index = 0; index < taken; ++index)
      if (fresh(tokens + index) == id) return true;
    return false;
  }

  // A token by the two-level race, none of the first `taken`; kNobody where they left nothing.
  SPECDEC_DEVICE int draw_without(const int64_t* tokens, int taken, const Noise& noise) const {
    const Probabilities probability(d_);
    const auto left = [&](int id, float x) { return is_taken(tokens, taken, id) ? 0.0f : probability(x); };
    const int drawn = draw(team_, probability, d_.filtered(), table_, noise, [&](int first, float* w) {
      SPECDEC_UNROLL
      for (int k = 0; k < 4; ++k) w[k] = first + k < vocab_ ? left(first + k, rows_.logit(0, first + k)) : 0.0f;
    });
    if (drawn == kNobody || probability(rows_.logit(0, drawn)) >= float(kNothingLeft)) return drawn;
    float share = 0.0f;
    for_ids(team_, rows_, 0, [&](int id, float x) { share += left(id, x); });
    return team_.reduce(share, Plus()) < float(kNothingLeft) ? kNobody : drawn;
  }

  const Team& team_;
  const Sample& op_;
  const Workspace& work_;
  const int r_, slice_, vocab_;
  const Sampling sampling_;
  const Table table_;
  const uint64_t seed_, position_, row_;
  const Rows<T> rows_;
  Distribution d_;
  bool valid_ = false;
};

template <class T, bool kWithRace>
struct SampleProgram : RowProgram<T> {
  using RowProgram<T>::RowProgram;
  SPECDEC_DEVICE void run() { this->template sample<kWithRace>(); }
};

// Siblings come out of few rows, so one kernel does for any dtype.
struct ChildrenProgram : RowProgram<Mixed> {
  SPECDEC_DEVICE ChildrenProgram(const Team& team, const SampleChildren& op, const Workspace& work, const Part& part)
      : RowProgram<Mixed>(team, op.common, work, part), op_(op) {}
  SPECDEC_DEVICE void run() { sample_children(int(op_.count), op_.how); }

 private:
  const SampleChildren& op_;
};

template <class F>
auto with_program(const Sample& op, const F& f) {
  return with_dtype(op, [&](auto type) {
    using T = typename decltype(type)::type;
    return op.coupled ? f(TypeOf<SampleProgram<T, true>>()) : f(TypeOf<SampleProgram<T, false>>());
  });
}
template <class F>
auto with_program(const SampleChildren&, const F& f) {
  return f(TypeOf<ChildrenProgram>());
}

}  // namespace specdec::cuda
