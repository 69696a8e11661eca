// Draws of a drafter: one token a row, or the children of a node.
#include <algorithm>
#include <cmath>
#include <vector>

#include "request.h"

namespace specdec {
namespace {

// A row as its distribution sees it, after the pass over it.
RowView row_view(const Sample& op, const Workers& workers, int64_t r) {
  const Row row = row_at(op.logits, op.vocab, r * op.logits.row_stride, op.target_to_draft);
  const Source source(row, mask_of(op.processing, op.vocab, r), adjustments_of(op.processing, r));
  TileSpace& space = scratch().draft;
  space.resize(tiles_of(op.vocab));
  RowView view(workers, source, sampling_of(op.sampling, r), space);
  view.pass_all();
  float* stats = op.out_stats + 3 * r;
  stats[0] = view.valid() ? view.scale() : NAN;
  stats[1] = view.valid() ? view.cutoff() : NAN;
  stats[2] = view.valid() ? float(view.logsumexp()) : NAN;
  return view;
}

// Noise of a draw in its own row; of the flat race at its absolute position.
Noise draft_noise(const Sample& op, int64_t r, int64_t row) {
  return {uint64_t(op.seed[r]), uint64_t(op.position[r]), kDraft | uint32_t(row) << 16};
}
Noise race_noise(const Sample& op, int64_t r) {
  return {uint64_t(op.seed[r]), uint64_t(op.position[r] + op.row[r]), kCoupled};
}

void sample_row(const Sample& op, const Workers& workers, int64_t r) {
  const RowView view = row_view(op, workers, r);
  if (!view.valid())
    op.out_tokens[r] = view.largest_finite();
  else if (op.coupled)
    op.out_tokens[r] = view.flat_draw(race_noise(op, r));
  else
    op.out_tokens[r] = view.draw(draft_noise(op, r, op.row[r]));
  op.out_logprobs[r] = view.valid() ? float(view.logprob(op.out_tokens[r])) : NAN;
}

// The `count` best of what comes in, lower id on ties.
class Best {
 public:
  struct Entry {
    float value;  // smallest first
    int64_t token;
    bool operator<(const Entry& other) const {
      return value < other.value || (value == other.value && token < other.token);
    }
  };

  explicit Best(int64_t count) : count_(size_t(count)) {}

  float worst() const { return heap_.size() < count_ ? INFINITY : heap_.front().value; }
  void add(Entry entry) {
    if (heap_.size() == count_) {
      if (!(entry < heap_.front())) return;
      std::pop_heap(heap_.begin(), heap_.end());
      heap_.pop_back();
    }
    heap_.push_back(entry);
    std::push_heap(heap_.begin(), heap_.end());
  }
  const std::vector<Entry>& sorted() {
    std::sort_heap(heap_.begin(), heap_.end());
    return heap_;
  }

 private:
  size_t count_;
  std::vector<Entry> heap_;
};

// What every piece of a row offers, put together.
template <class F>
std::vector<int64_t> best_of_pieces(const RowView& view, int64_t count, const F& offer) {
  std::vector<Best> found(view.pieces(), Best(count));
  view.each_piece([&](uint32_t piece) { offer(piece, found[piece]); });
  Best best(count);
  for (Best& piece : found)
    for (const Best::Entry& entry : piece.sorted()) best.add(entry);
  std::vector<int64_t> tokens;
  for (const Best::Entry& entry : best.sorted()) tokens.push_back(entry.token);
  return tokens;
}

// The children of one node; fewer than asked for where its distribution has no more to give.
std::vector<int64_t> children_of(const SampleChildren& op, RowView& view, int64_t r) {
  const Sample& row = op.common;
  if (!view.valid()) return {view.largest_finite()};
  if (is_greedy(view.scale()))
    return std::vector<int64_t>(op.method == Children::iid ? size_t(op.count) : 1, view.argmax());
  switch (op.method) {
    case Children::top:
      return best_of_pieces(view, op.count, [&](uint32_t piece, Best& best) {
        view.each_logit(
            piece, [&] { return -best.worst(); }, [&](int64_t token, float logit) { best.add({-logit, token}); });
      });
    case Children::race:
      return best_of_pieces(view, op.count, [&](uint32_t piece, Best& best) {
        view.each_arrival(piece, race_noise(row, r), float(kNothingLeft),
                          [&](int64_t token, float time) { best.add({time, token}); });
      });
    default: {
      std::vector<int64_t> tokens;
      while (int64_t(tokens.size()) < op.count && view.share_left() >= kNothingLeft) {
        tokens.push_back(view.draw(draft_noise(row, r, row.row[r] + int64_t(tokens.size()))));
        if (op.method == Children::without_replacement) view.remove(tokens.back());
      }
      return tokens;
    }
  }
}

void sample_children_row(const SampleChildren& op, const Workers& workers, int64_t r) {
  RowView view = row_view(op.common, workers, r);
  const std::vector<int64_t> tokens = children_of(op, view, r);
  for (int64_t i = 0; i < op.count; ++i) {
    const bool there = i < int64_t(tokens.size());
    op.common.out_tokens[r * op.count + i] = there ? tokens[size_t(i)] : -1;
    op.common.out_logprobs[r * op.count + i] = there && view.valid() ? float(view.logprob(tokens[size_t(i)])) : NAN;
  }
}

}  // namespace

void sample(const Sample& op, int64_t threads, RunOnThreads run) {
  each_request(op.rows, op.vocab, threads, run, [&](int64_t r, const Workers& workers) { sample_row(op, workers, r); });
}

void sample_children(const SampleChildren& op, int64_t threads, RunOnThreads run) {
  each_request(op.common.rows, op.common.vocab, threads, run,
               [&](int64_t r, const Workers& workers) { sample_children_row(op, workers, r); });
}

}  // namespace specdec
