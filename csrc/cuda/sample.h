// `sample` and `sample_children`.
#pragma once

#include "distribution.h"

namespace specdec::cuda {

// One row. kRace: it is measured with the race of all ids.
template <class T, bool kRace>
class SampleProgram {
 public:
  SPECDEC_DEVICE SampleProgram(const Sample& op, const Plan& work, const Part& part)
      : op_(op), work_(work), r_(part.request), slice_(part.slice), row_{kTargetRows, 0} {
    if (block::rank() == 0) {
      Rows& rows = block::memory().rows[kTargetRows] =
          described(op.logits, r_ * op.logits.row_stride, op.vocab, sampling_of(op.sampling, r_), work, r_);
      rows.columns = {op.target_to_draft, int(op.logits.width)};
      rows.mask = mask_of(op.processing, op.vocab, r_), rows.adjustments = adjustments_of(op.processing, r_);
    }
    block::sync();
  }

  SPECDEC_DEVICE void run() {
    if (!measured()) return;
    int token = found().argmax;
    if (token < 0) token = kRace ? flat_race(row_, found(), coupled_noise()) : draw_from(row_, found(), noise(0));
    write(op_.out_tokens + row(), op_.out_logprobs + row(), token);
  }

 protected:
  // What is drawn from, in the block's memory.
  SPECDEC_DEVICE static Distribution& found() { return *reinterpret_cast<Distribution*>(block::memory().request); }
  // Nothing that follows from the row's number is held in registers: it is read again.
  SPECDEC_DEVICE int64_t row() const {
    uint32_t row = uint32_t(r_);
    compute_here(row);
    return int64_t(row);
  }
  SPECDEC_DEVICE uint64_t of_row(const int64_t* numbers) const { return uint64_t(given(numbers + row())); }
  SPECDEC_DEVICE Noise noise(int child) const {
    return {of_row(op_.seed), of_row(op_.position), kDraft | uint32_t(of_row(op_.row) + uint64_t(child)) << 16};
  }
  SPECDEC_DEVICE Noise coupled_noise() const {
    return {of_row(op_.seed), of_row(op_.position) + of_row(op_.row), kCoupled | kTokenRace << 8};
  }

  // Measures this block's slice; whether it is the last to, and goes on. Then the distribution is known, and written.
  SPECDEC_DEVICE bool measured() {
    const int begin = slice_ * work_.length, end = std::min(begin + work_.length, work_.spans);
    measure<kRace>(row_, begin + block::warp(), end, kWarps, coupled_noise());
    if (!comes_last(work_.counters + row(), work_.slices)) return false;
    find_distribution(row_, found());
    if (block::rank() == 0) {
      op_.out_stats[3 * row()] = found().valid ? found().scale : NAN;
      op_.out_stats[3 * row() + 1] = found().valid ? found().cutoff : NAN;
      op_.out_stats[3 * row() + 2] = found().valid ? found().logsumexp() : NAN;
    }
    return true;
  }

  SPECDEC_DEVICE void write(int64_t* token, float* logprob, int drawn) const {
    if (block::rank() != 0) return;
    *token = drawn == kNobody ? -1 : drawn;
    *logprob = drawn != kNobody && found().valid ? float(found().log_prob(row_.logit(drawn), drawn)) : NAN;
  }

  const Sample& op_;
  const Plan& work_;
  const int r_, slice_;
  const Row<T> row_;
};

// Siblings come out of few rows, so one kernel does for any dtype.
class ChildrenProgram : SampleProgram<Mixed, false> {
 public:
  SPECDEC_DEVICE ChildrenProgram(const SampleChildren& op, const Plan& work, const Part& part)
      : SampleProgram(op.common, work, part), count_(int(op.count)), method_(op.method) {}

  // Fewer than `count` where the distribution has no more to give.
  SPECDEC_DEVICE void run() {
    if (!measured()) return;
    int64_t* const tokens = op_.out_tokens + row() * count_;
    Arrived last;  // in order: by falling logit, or by arrival
    last.time = -INFINITY, last.id = -1;
    for (int child = 0; child < count_; ++child) {
      int drawn = kNobody;
      if (found().argmax >= 0) {
        // A point mass has one child, unless it is drawn again; a row that is not valid has one.
        if (child == 0 || (method_ == Children::iid && found().valid)) drawn = found().argmax;
      } else if (method_ == Children::top || method_ == Children::race) {
        if (last.id != kNobody) last = next_best(last);
        drawn = last.id;
      } else {
        block::sync();  // the tokens before were written by one thread
        drawn = draw_without(tokens, method_ == Children::iid ? 0 : child, noise(child));
      }
      write(tokens + child, op_.out_logprobs + row() * count_ + child, drawn);
    }
  }

 private:
  // What comes behind `last` when ids are ordered by falling logit, or by arrival in the flat race.
  SPECDEC_DEVICE Arrived next_best(const Arrived& last) const {
    const Probabilities probability = probabilities_of(found());
    Arrived best;
    row_.for_ids(0, row_.vocab(), [&](int id, float x) {
      Arrived here{-x, id};
      if (method_ == Children::race) {
        const float weight = probability(x);
        if (weight < float(kNothingLeft)) return;
        const Words words = philox(coupled_noise(), uint32_t(id / 4));
        here.time = quotient(exponential(at_of(words.w, id % 4)), weight);
      } else if (x < found().cutoff || x == -INFINITY) {
        return;
      }
      if (here.time > last.time || (here.time == last.time && here.id > last.id)) best = Earlier()(best, here);
    });
    return block::reduce(best, Earlier());
  }

  // A token by the two-level race, none of the first `count`; kNobody where they left nothing.
  SPECDEC_DEVICE int draw_without(const int64_t* tokens, int count, const Noise& noise) const {
    const Probabilities probability = probabilities_of(found());
    const auto left = [&](int id, float x) {
      for (int index = 0; index < count; ++index)
        if (load_l2(tokens + index) == id) return 0.0f;
      return probability(x);
    };
    const int drawn = draw(row_, found(), noise, [&](int first, float (&w)[4], const auto&) {
      row_.load(first, w);
      SPECDEC_UNROLL
      for (int k = 0; k < 4; ++k) w[k] = left(first + k, w[k]);
    });
    if (drawn == kNobody || probability(row_.logit(drawn)) >= float(kNothingLeft)) return drawn;
    float share = 0.0f;
    row_.for_ids(0, row_.vocab(), [&](int id, float x) { share += left(id, x); });
    return block::reduce(share, std::plus<>()) < float(kNothingLeft) ? kNobody : drawn;
  }

  const int count_;
  const Children method_;
};

template <class F>
auto with_program(const Sample& op, const F& f) {
  return with_dtype(shape_of(op), [&](auto type) {
    using T = typename decltype(type)::type;
    return op.coupled ? f(TypeOf<SampleProgram<T, true>>()) : f(TypeOf<SampleProgram<T, false>>());
  });
}
template <class F>
auto with_program(const SampleChildren&, const F& f) {
  return f(TypeOf<ChildrenProgram>());
}

}  // namespace specdec::cuda
