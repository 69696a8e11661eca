// From tensors to the structs of ops.h, for every backend in C++. A tensor is whatever has the accessors of
// torch::stable::Tensor: that itself behind PyTorch's dispatcher, a view of a Python object before it.
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

// Temperature, filters, mask and edits: what makes a distribution of logits.
template <class Tensor>
struct DistributionArguments {
  std::optional<Tensor> sampling;
  double temperature;
  int64_t top_k;
  double top_p, min_p;
  std::optional<Tensor> bitmask, edit_ids, edit_counts, edit_bias, penalties;

  SamplingParameters parameters() const {
    return {data_of<float>(sampling), float(temperature), top_k, float(top_p), float(min_p)};
  }

  Processing processing() const {
    return {reinterpret_cast<const uint32_t*>(data_of<int32_t>(bitmask)),
            edit_ids ? edit_ids->size(1) : 0,
            data_of<int32_t>(edit_ids),
            data_of<int32_t>(edit_counts),
            data_of<float>(edit_bias),
            data_of<float>(penalties)};
  }

  // All but the mask, whose shape differs.
  bool taken(const ArgumentChecker<Tensor>& by, int64_t requests) const {
    return by.sampling(sampling, requests, temperature, top_k, top_p, min_p) &&
           by.edits(requests, edit_ids, edit_counts, edit_bias, penalties);
  }
};

// What drafts without stats were drawn at: each request its own temperature, or one for all.
template <class Tensor>
struct DraftTemperature {
  std::optional<Tensor> each;
  double all = 1.0;
};

// Where the results of a chain or a tree go.
struct VerifyResults {
  int64_t* tokens;
  int32_t* accepted;
  bool* valid;
  float *logprobs, *raw_logprobs;
};

template <class Tensor>
Verification verification(const Tensor& target_logits, const Tensor& draft_tokens,
                          const std::optional<Tensor>& draft_logits, const std::optional<Tensor>& draft_stats,
                          const std::optional<Tensor>& target_to_draft,
                          const DraftTemperature<Tensor>& draft_temperature, const Tensor& seed, const Tensor& position,
                          const DistributionArguments<Tensor>& distribution, int64_t rows, const VerifyResults& results,
                          bool logprobs) {
  return {
      .batch = draft_tokens.size(0),
      .rows = rows,
      .vocab = target_logits.size(target_logits.dim() - 1),
      .target = logits_of(target_logits),
      .draft = draft_logits ? logits_of(*draft_logits) : Logits{},
      .tokens = ids_of(draft_tokens),
      .token_strides = {draft_tokens.stride(0), draft_tokens.stride(1)},
      .draft_stats = data_of<float>(draft_stats),
      .target_to_draft = data_of<int32_t>(target_to_draft),
      .draft_rows = draft_tokens.size(1),
      .draft_temperatures = data_of<float>(draft_temperature.each),
      .draft_temperature = float(draft_temperature.all),
      .seed = data_of<int64_t>(seed),
      .position = data_of<int64_t>(position),
      .sampling = distribution.parameters(),
      .processing = distribution.processing(),
      .out_tokens = results.tokens,
      .out_accepted = results.accepted,
      .out_valid = results.valid,
      .out_logprobs = logprobs ? results.logprobs : nullptr,
      .out_raw_logprobs = logprobs ? results.raw_logprobs : nullptr,
  };
}

// Of `verify_chain`.
template <class Tensor>
struct ChainArguments {
  Tensor target_logits, draft_tokens;
  std::optional<Tensor> draft_logits, draft_stats, target_to_draft;
  DraftTemperature<Tensor> draft_temperature;
  Tensor seed, position;
  std::optional<Tensor> num_draft, cu_rows;
  DistributionArguments<Tensor> distribution;
  Rule rule;
  bool logprobs, independent;
  std::optional<Tensor> workspace;

  int64_t batch() const { return draft_tokens.size(0); }
  int64_t rows() const { return draft_tokens.size(1) + 1; }

  void require() const {
    using torch::headeronly::ScalarType;
    const ArgumentChecker<Tensor> taken(target_logits);
    taken.require(draft_tokens.dim() == 2 && target_logits.dim() == (cu_rows ? 2 : 3));
    const int64_t all = target_logits.size(0), vocab = target_logits.size(cu_rows ? 1 : 2), words = (vocab + 31) / 32;
    taken.require(cu_rows ? taken.logits(target_logits, {all, vocab}) &&
                                taken.array(distribution.bitmask, ScalarType::Int, {all, words}) &&
                                taken.offsets(*cu_rows, batch(), rows() - 1, all)
                          : taken.logits(target_logits, {batch(), rows(), vocab}) &&
                                taken.array(distribution.bitmask, ScalarType::Int, {batch(), rows(), words}));
    taken.require(taken.drafts(draft_tokens, vocab, draft_logits, draft_stats, target_to_draft, num_draft) &&
                  taken.temperatures(draft_temperature.each, draft_temperature.all, batch()) &&
                  taken.keys(seed, batch()) && taken.keys(position, batch()) && distribution.taken(taken, batch()) &&
                  taken.workspace(workspace, workspace_bytes(batch(), rows(), vocab)));
  }

  VerifyChain op(const VerifyResults& results, int32_t* counters) const {
    return {
        .common = verification(target_logits, draft_tokens, draft_logits, draft_stats, target_to_draft,
                               draft_temperature, seed, position, distribution, rows(), results, logprobs),
        .cu_rows = data_of<int64_t>(cu_rows),
        .num_draft = num_draft ? ids_of(*num_draft) : Ids{},
        .rule = rule,
        .independent = independent,
        .out_counters = counters,
        .workspace = workspace ? workspace->mutable_data_ptr() : nullptr,
        .workspace_bytes = workspace ? workspace->size(0) : 0,
    };
  }
};

// Of `verify_tree`.
template <class Tensor>
struct TreeArguments {
  Tensor target_logits, draft_tokens, parents;
  std::optional<Tensor> draft_logits, draft_stats, target_to_draft;
  DraftTemperature<Tensor> draft_temperature;
  Tensor seed, position;
  DistributionArguments<Tensor> distribution;
  TreeRule rule;
  bool replacement, logprobs;

  int64_t batch() const { return parents.size(0); }
  int64_t nodes() const { return parents.size(1); }

  void require() const {
    using torch::headeronly::ScalarType;
    const ArgumentChecker<Tensor> taken(target_logits);
    taken.require(target_logits.dim() == 3 && parents.dim() == 2);
    const int64_t vocab = target_logits.size(2);
    taken.require(nodes() <= kMaxRows && taken.tree(parents, draft_tokens, vocab) &&
                  taken.logits(target_logits, {batch(), nodes(), vocab}) &&
                  taken.draft_rows(draft_logits, draft_stats, target_to_draft, batch(), nodes(), vocab) &&
                  taken.temperatures(draft_temperature.each, draft_temperature.all, batch()) &&
                  taken.keys(seed, batch()) && taken.keys(position, batch()) && distribution.taken(taken, batch()) &&
                  taken.array(distribution.bitmask, ScalarType::Int, {batch(), nodes(), (vocab + 31) / 32}));
  }

  VerifyTree op(const VerifyResults& results, int32_t* out_nodes) const {
    return {
        .common = verification(target_logits, draft_tokens, draft_logits, draft_stats, target_to_draft,
                               draft_temperature, seed, position, distribution, nodes(), results, logprobs),
        .parents = data_of<int64_t>(parents),
        .rule = rule,
        .replacement = replacement,
        .out_nodes = out_nodes,
    };
  }
};

// Where what is drawn from rows goes.
struct DrawResults {
  int64_t* tokens;
  float *logprobs, *stats;
};

// Of `sample`.
template <class Tensor>
struct SampleArguments {
  Tensor logits;
  std::optional<Tensor> target_to_draft;
  Tensor seed, position, row;
  DistributionArguments<Tensor> distribution;
  bool coupled;

  int64_t vocab() const { return target_to_draft ? target_to_draft->size(0) : logits.size(1); }

  void require() const {
    using torch::headeronly::ScalarType;
    const ArgumentChecker<Tensor> taken(logits);
    taken.require(logits.dim() == 2 && (!target_to_draft || target_to_draft->dim() == 1));
    const int64_t rows = logits.size(0);
    taken.require(taken.logits(logits, {rows, logits.size(1)}) &&
                  taken.array(target_to_draft, ScalarType::Int, {vocab()}) && taken.keys(seed, rows) &&
                  taken.keys(position, rows) && taken.rows_of_step(row, rows) && distribution.taken(taken, rows) &&
                  taken.array(distribution.bitmask, ScalarType::Int, {rows, (vocab() + 31) / 32}));
  }

  Sample op(const DrawResults& results) const {
    return {
        .rows = logits.size(0),
        .vocab = vocab(),
        .logits = logits_of(logits),
        .target_to_draft = data_of<int32_t>(target_to_draft),
        .seed = data_of<int64_t>(seed),
        .position = data_of<int64_t>(position),
        .row = data_of<int64_t>(row),
        .sampling = distribution.parameters(),
        .processing = distribution.processing(),
        .coupled = coupled,
        .out_tokens = results.tokens,
        .out_logprobs = results.logprobs,
        .out_stats = results.stats,
    };
  }
};

}  // namespace specdec
