// From an operator's arguments to the structs of ops.h, for every backend in C++: behind PyTorch's dispatcher
// (operators.h) and before it (csrc/native/fast_path.cpp). These differ in what a tensor is, torch::stable::Tensor or
// what has its accessors; in how arguments are read, by a `next` that gives one after the other, in the order of the
// schemas of specdec_kernels/reference/schema.py; and in how results are made, by `results.add<T>(sizes...)`, in that
// order.
#pragma once

#include <optional>

#include "ops.h"
#include "argument_checker.h"

namespace specdec {

template <class Tensor>
DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::f32;
  }
}

template <class Tensor>
Logits logits_of(const Tensor& t) {
  const bool batched = t.dim() == 3;
  return {t.const_data_ptr(), dtype_of(t), batched ? t.stride(0) : 0, t.stride(batched ? 1 : 0), t.size(t.dim() - 1)};
}

template <class Tensor>
Ids ids_of(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == torch::headeronly::ScalarType::Long};
}

template <class T, class Tensor>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T, class Tensor>
const T* data_of(const std::optional<Tensor>& t) {
  return t ? data_of<T>(*t) : nullptr;
}

// Temperature, filters, mask and adjustments: what makes a distribution of logits.
template <class Tensor>
struct DistributionArguments {
  std::optional<Tensor> sampling;
  double temperature;
  int64_t top_k;
  double top_p, min_p;
  std::optional<Tensor> bitmask, adjusted_ids, id_counts, id_bias, penalties;

  SamplingParameters parameters() const {
    return {data_of<float>(sampling), float(temperature), top_k, float(top_p), float(min_p)};
  }

  Processing processing() const {
    return {reinterpret_cast<const uint32_t*>(data_of<int32_t>(bitmask)),
            adjusted_ids ? adjusted_ids->size(1) : 0,
            data_of<int32_t>(adjusted_ids),
            data_of<int32_t>(id_counts),
            data_of<float>(id_bias),
            data_of<float>(penalties)};
  }

  template <class Next>
  static DistributionArguments read(Next& next) {
    return {next.optional(), next.number(),   next.integer(),  next.number(),   next.number(),
            next.optional(), next.optional(), next.optional(), next.optional(), next.optional()};
  }

  // All but the mask, whose shape differs.
  bool accepted_by(const ArgumentChecker<Tensor>& check, int64_t requests) const {
    return check.sampling(sampling, requests, temperature, top_k, top_p, min_p) &&
           check.adjustments(requests, adjusted_ids, id_counts, id_bias, penalties);
  }
};

// What is known of drafts beside their tokens, and what the noise is keyed on. Drafts without stats were drawn at a
// temperature: each request its own, or one for all.
template <class Tensor>
struct DraftArguments {
  std::optional<Tensor> logits, stats, target_to_draft, temperatures;
  double temperature;
  Tensor seed, position;

  template <class Next>
  static DraftArguments read(Next& next) {
    return {next.optional(), next.optional(), next.optional(), next.optional(),
            next.number(),   next.tensor(),   next.tensor()};
  }

  bool accepted_by(const ArgumentChecker<Tensor>& check, int64_t batch, int64_t rows, int64_t vocab) const {
    return check.draft_rows(logits, stats, target_to_draft, batch, rows, vocab) &&
           check.temperatures(temperatures, temperature, batch) && check.keys(seed, batch) &&
           check.keys(position, batch);
  }
};

// Where the results of a chain or a tree go: a tree's nodes come behind the tokens, a chain's counters behind the
// flags. Log-probabilities that nobody asked for are empty.
struct VerifyResults {
  int64_t* tokens;
  int32_t *nodes = nullptr, *accepted, *counters = nullptr;
  bool* valid;
  float *logprobs = nullptr, *raw_logprobs = nullptr;

  template <class Results>
  VerifyResults(Results& results, int64_t batch, int64_t rows, bool tree, bool scores) {
    tokens = results.template add<int64_t>(batch, rows);
    if (tree) nodes = results.template add<int32_t>(batch, rows);
    accepted = results.template add<int32_t>(batch);
    valid = results.template add<bool>(batch);
    if (!tree) counters = results.template add<int32_t>(batch, 2);
    for (float** each : {&logprobs, &raw_logprobs})
      if (scores)
        *each = results.template add<float>(batch, rows);
      else
        results.add_nothing();
  }
};

template <class Tensor>
Verification verification(const Tensor& target_logits, const Tensor& draft_tokens, const DraftArguments<Tensor>& drafts,
                          const DistributionArguments<Tensor>& distribution, int64_t rows,
                          const VerifyResults& results) {
  return {
      .batch = draft_tokens.size(0),
      .rows = rows,
      .vocab = target_logits.size(target_logits.dim() - 1),
      .target = logits_of(target_logits),
      .draft = drafts.logits ? logits_of(*drafts.logits) : Logits{},
      .tokens = ids_of(draft_tokens),
      .token_strides = {draft_tokens.stride(0), draft_tokens.stride(1)},
      .draft_stats = data_of<float>(drafts.stats),
      .target_to_draft = data_of<int32_t>(drafts.target_to_draft),
      .draft_rows = draft_tokens.size(1),
      .draft_temperatures = data_of<float>(drafts.temperatures),
      .draft_temperature = float(drafts.temperature),
      .seed = data_of<int64_t>(drafts.seed),
      .position = data_of<int64_t>(drafts.position),
      .sampling = distribution.parameters(),
      .processing = distribution.processing(),
      .out_tokens = results.tokens,
      .out_accepted = results.accepted,
      .out_valid = results.valid,
      .out_logprobs = results.logprobs,
      .out_raw_logprobs = results.raw_logprobs,
  };
}

// Of `verify_chain`. Of these structs: how many results and arguments there are, where the keys of the noise begin and
// end, and where the temperature is.
template <class Tensor>
struct ChainArguments {
  static constexpr int kResults = 6, kCount = 25, kKeys = 7, kKeysEnd = 9, kTemperature = 12;
  Tensor target_logits, draft_tokens;
  DraftArguments<Tensor> drafts;
  std::optional<Tensor> num_draft, cu_rows;
  DistributionArguments<Tensor> distribution;
  Rule rule;
  bool logprobs, independent;
  std::optional<Tensor> workspace;

  template <class Next>
  static ChainArguments read(Next& next) {
    return {next.tensor(),        next.tensor(),   DraftArguments<Tensor>::read(next),
            next.optional(),      next.optional(), DistributionArguments<Tensor>::read(next),
            Rule(next.integer()), next.flag(),     next.flag(),
            next.optional()};
  }

  const Tensor& first() const { return target_logits; }
  int64_t batch() const { return draft_tokens.size(0); }
  int64_t rows() const { return draft_tokens.size(1) + 1; }

  void require() const {
    using torch::headeronly::ScalarType;
    const ArgumentChecker<Tensor> check(target_logits);
    check.require(draft_tokens.dim() == 2 && target_logits.dim() == (cu_rows ? 2 : 3));
    const int64_t all = target_logits.size(0), vocab = target_logits.size(cu_rows ? 1 : 2), words = words_of(vocab);
    check.require(cu_rows ? check.logits(target_logits, {all, vocab}) &&
                                check.array(distribution.bitmask, ScalarType::Int, {all, words}) &&
                                check.offsets(*cu_rows, batch(), rows() - 1, all)
                          : check.logits(target_logits, {batch(), rows(), vocab}) &&
                                check.array(distribution.bitmask, ScalarType::Int, {batch(), rows(), words}));
    check.require(check.drafted(draft_tokens, num_draft) && drafts.accepted_by(check, batch(), rows() - 1, vocab) &&
                  distribution.accepted_by(check, batch()) &&
                  check.workspace(workspace, workspace_bytes(batch(), rows(), vocab)));
  }

  template <class Results>
  VerifyChain op(Results& made) const {
    const VerifyResults results(made, batch(), rows(), false, logprobs);
    return {
        .common = verification(target_logits, draft_tokens, drafts, distribution, rows(), results),
        .cu_rows = data_of<int64_t>(cu_rows),
        .num_draft = num_draft ? ids_of(*num_draft) : Ids{},
        .rule = rule,
        .independent = independent,
        .out_counters = results.counters,
        .workspace = workspace ? workspace->mutable_data_ptr() : nullptr,
        .workspace_bytes = workspace ? workspace->size(0) : 0,
    };
  }
};

// Of `verify_tree`.
template <class Tensor>
struct TreeArguments {
  static constexpr int kResults = 6, kCount = 23, kKeys = 8, kKeysEnd = 10, kTemperature = 11;
  Tensor target_logits, draft_tokens, parents;
  DraftArguments<Tensor> drafts;
  DistributionArguments<Tensor> distribution;
  TreeRule rule;
  bool replacement, logprobs;

  template <class Next>
  static TreeArguments read(Next& next) {
    return {next.tensor(),
            next.tensor(),
            next.tensor(),
            DraftArguments<Tensor>::read(next),
            DistributionArguments<Tensor>::read(next),
            TreeRule(next.integer()),
            next.flag(),
            next.flag()};
  }

  const Tensor& first() const { return target_logits; }
  int64_t batch() const { return parents.size(0); }
  int64_t nodes() const { return parents.size(1); }

  void require() const {
    using torch::headeronly::ScalarType;
    const ArgumentChecker<Tensor> check(target_logits);
    check.require(target_logits.dim() == 3 && parents.dim() == 2);
    const int64_t vocab = target_logits.size(2);
    check.require(nodes() <= kMaxRows && check.tree(parents, draft_tokens, vocab) &&
                  check.logits(target_logits, {batch(), nodes(), vocab}) &&
                  drafts.accepted_by(check, batch(), nodes(), vocab) && distribution.accepted_by(check, batch()) &&
                  check.array(distribution.bitmask, ScalarType::Int, {batch(), nodes(), words_of(vocab)}));
  }

  template <class Results>
  VerifyTree op(Results& made) const {
    const VerifyResults results(made, batch(), nodes(), true, logprobs);
    return {
        .common = verification(target_logits, draft_tokens, drafts, distribution, nodes(), results),
        .parents = data_of<int64_t>(parents),
        .rule = rule,
        .replacement = replacement,
        .out_nodes = results.nodes,
    };
  }
};

// Of any draw from rows.
template <class Tensor>
struct RowArguments {
  Tensor logits;
  std::optional<Tensor> target_to_draft;
  Tensor seed, position, row;
  DistributionArguments<Tensor> distribution;

  template <class Next>
  static RowArguments read(Next& next) {
    return {next.tensor(), next.optional(), next.tensor(),
            next.tensor(), next.tensor(),   DistributionArguments<Tensor>::read(next)};
  }

  int64_t vocab() const { return target_to_draft ? target_to_draft->size(0) : logits.size(1); }

  void require() const {
    using torch::headeronly::ScalarType;
    const ArgumentChecker<Tensor> check(logits);
    check.require(logits.dim() == 2 && (!target_to_draft || target_to_draft->dim() == 1));
    const int64_t rows = logits.size(0);
    check.require(check.logits(logits, {rows, logits.size(1)}) &&
                  check.array(target_to_draft, ScalarType::Int, {vocab()}) && check.keys(seed, rows) &&
                  check.keys(position, rows) && check.rows_of_step(row, rows) &&
                  distribution.accepted_by(check, rows) &&
                  check.array(distribution.bitmask, ScalarType::Int, {rows, words_of(vocab())}));
  }

  // `count` tokens of each row.
  template <class Results, class... Count>
  Sample op(Results& results, bool coupled, Count... count) const {
    const int64_t rows = logits.size(0);
    return {
        .rows = rows,
        .vocab = vocab(),
        .logits = logits_of(logits),
        .target_to_draft = data_of<int32_t>(target_to_draft),
        .seed = data_of<int64_t>(seed),
        .position = data_of<int64_t>(position),
        .row = data_of<int64_t>(row),
        .sampling = distribution.parameters(),
        .processing = distribution.processing(),
        .coupled = coupled,
        .out_tokens = results.template add<int64_t>(rows, count...),
        .out_logprobs = results.template add<float>(rows, count...),
        .out_stats = results.template add<float>(rows, 3),
    };
  }
};

// Of `sample`.
template <class Tensor>
struct SampleArguments {
  static constexpr int kResults = 3, kCount = 16, kKeys = 2, kKeysEnd = 5, kTemperature = 6;
  RowArguments<Tensor> rows;
  bool coupled;

  template <class Next>
  static SampleArguments read(Next& next) {
    return {RowArguments<Tensor>::read(next), next.flag()};
  }

  const Tensor& first() const { return rows.logits; }
  void require() const { rows.require(); }

  template <class Results>
  Sample op(Results& results) const {
    return rows.op(results, coupled);
  }
};

// Of `sample_children`.
template <class Tensor>
struct ChildrenArguments {
  static constexpr int kResults = 3, kCount = 17, kKeys = 2, kKeysEnd = 5, kTemperature = 6;
  RowArguments<Tensor> rows;
  int64_t count;
  Children method;

  template <class Next>
  static ChildrenArguments read(Next& next) {
    return {RowArguments<Tensor>::read(next), next.integer(), Children(next.integer())};
  }

  const Tensor& first() const { return rows.logits; }
  void require() const { rows.require(); }

  template <class Results>
  SampleChildren op(Results& results) const {
    return {rows.op(results, false, count), count, method};
  }
};

}  // namespace specdec
