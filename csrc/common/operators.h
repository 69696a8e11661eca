// From PyTorch's arguments to the structs of ops.h, for every backend in C++. The schemas are in
// specdec_kernels/ops/schema.py. Stable ABI: one build serves torch 2.10 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "ops.h"
#include "taken.h"

namespace specdec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::f32;
  }
}

inline Logits logits_of(const Tensor& t) {
  const bool batched = t.dim() == 3;
  return {t.const_data_ptr(), dtype_of(t), batched ? t.stride(0) : 0, t.stride(batched ? 1 : 0)};
}

inline Ids ids_of(const OptionalTensor& t) {
  if (!t) return {};
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Long};
}

template <class T>
const T* data_of(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Beside `like`. Straight to the allocator: the stable `new_empty` looks its operator up by name, a microsecond each
// time.
inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes.begin()[1]);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype,
                                                         int32_t(like.device().type()), like.get_device_index(),
                                                         &handle));
  return Tensor(handle);
}

inline SamplingParameters sampling_of(const OptionalTensor& each, double temperature, int64_t top_k, double top_p,
                                      double min_p) {
  return {data_of<float>(each), float(temperature), top_k, float(top_p), float(min_p)};
}

inline Processing processing_of(const OptionalTensor& bitmask, const OptionalTensor& ids, const OptionalTensor& counts,
                                const OptionalTensor& bias, const OptionalTensor& penalties) {
  return {reinterpret_cast<const uint32_t*>(data_of<int32_t>(bitmask)),
          ids ? ids->size(1) : 0,
          data_of<int32_t>(ids),
          data_of<int32_t>(counts),
          data_of<float>(bias),
          data_of<float>(penalties)};
}

// What a chain and a tree give back alike; log-probabilities are empty unless asked for.
struct Outputs {
  Tensor tokens, accepted, valid, scores, raw;

  Outputs(const Tensor& like, int64_t batch, int64_t rows, bool logprobs)
      : tokens(make(like, {batch, rows}, aoti_torch_dtype_int64())),
        accepted(make(like, {batch}, aoti_torch_dtype_int32())),
        valid(make(like, {batch}, aoti_torch_dtype_bool())),
        scores(make_scores(like, batch, rows, logprobs)),
        raw(make_scores(like, batch, rows, logprobs)) {}

  static Tensor make_scores(const Tensor& like, int64_t batch, int64_t rows, bool logprobs) {
    if (!logprobs) return make(like, {0}, aoti_torch_dtype_float32());
    return make(like, {batch, rows}, aoti_torch_dtype_float32());
  }
};

inline Verification verification(const Tensor& target_logits, const Tensor& draft_tokens,
                                 const OptionalTensor& draft_logits, const OptionalTensor& draft_stats,
                                 const Tensor& seed, const Tensor& position, const SamplingParameters& sampling,
                                 const Processing& processing, const Outputs& outputs, bool logprobs) {
  return {
      .batch = draft_tokens.size(0),
      .rows = outputs.tokens.size(1),
      .vocab = target_logits.size(target_logits.dim() - 1),
      .target = logits_of(target_logits),
      .draft = draft_logits ? logits_of(*draft_logits) : Logits{},
      .tokens = ids_of(draft_tokens),
      .token_strides = {draft_tokens.stride(0), draft_tokens.stride(1)},
      .draft_stats = data_of<float>(draft_stats),
      .draft_rows = draft_tokens.size(1),
      .seed = data_of<int64_t>(seed),
      .position = data_of<int64_t>(position),
      .sampling = sampling,
      .processing = processing,
      .out_tokens = out<int64_t>(outputs.tokens),
      .out_accepted = out<int32_t>(outputs.accepted),
      .out_valid = out<bool>(outputs.valid),
      .out_logprobs = logprobs ? out<float>(outputs.scores) : nullptr,
      .out_raw_logprobs = logprobs ? out<float>(outputs.raw) : nullptr,
  };
}

// What a draw from rows gives back; `shape` of the tokens.
struct Draws {
  Tensor tokens, logprobs, stats;

  Draws(const Tensor& logits, std::initializer_list<int64_t> shape)
      : tokens(make(logits, shape, aoti_torch_dtype_int64())),
        logprobs(make(logits, shape, aoti_torch_dtype_float32())),
        stats(make(logits, {logits.size(0), 3}, aoti_torch_dtype_float32())) {}
};

inline Sample sample_of(const Tensor& logits, const Tensor& seed, const Tensor& position, const Tensor& row,
                        const SamplingParameters& sampling, const Processing& processing, bool coupled,
                        const Draws& draws) {
  return {
      .rows = logits.size(0),
      .vocab = logits.size(1),
      .logits = logits_of(logits),
      .seed = data_of<int64_t>(seed),
      .position = data_of<int64_t>(position),
      .row = data_of<int64_t>(row),
      .sampling = sampling,
      .processing = processing,
      .coupled = coupled,
      .out_tokens = out<int64_t>(draws.tokens),
      .out_logprobs = out<float>(draws.logprobs),
      .out_stats = out<float>(draws.stats),
  };
}

// `verify_chain` by run(op, a tensor beside which to work).
template <auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> verify_chain_of(
    Tensor target_logits, Tensor draft_tokens, OptionalTensor draft_logits, OptionalTensor draft_stats, Tensor seed,
    Tensor position, OptionalTensor num_draft, OptionalTensor cu_rows, OptionalTensor sampling, double temperature,
    int64_t top_k, double top_p, double min_p, OptionalTensor bitmask, OptionalTensor edit_ids,
    OptionalTensor edit_counts, OptionalTensor edit_bias, OptionalTensor penalties, int64_t rule, bool logprobs,
    bool independent, OptionalTensor workspace) {
  const Taken taken(target_logits);
  taken.require(draft_tokens.dim() == 2 && target_logits.dim() == (cu_rows ? 2 : 3));
  const int64_t batch = draft_tokens.size(0), longest = draft_tokens.size(1);
  const int64_t rows = target_logits.size(0), vocab = target_logits.size(cu_rows ? 1 : 2), words = (vocab + 31) / 32;
  taken.require(cu_rows ? taken.logits(target_logits, {rows, vocab}) &&
                              taken.array(bitmask, ScalarType::Int, {rows, words}) &&
                              taken.offsets(*cu_rows, batch, longest, rows)
                        : taken.logits(target_logits, {batch, longest + 1, vocab}) &&
                              taken.array(bitmask, ScalarType::Int, {batch, longest + 1, words}));
  taken.require(taken.drafts(draft_tokens, vocab, draft_logits, draft_stats, num_draft) && taken.keys(seed, batch) &&
                taken.keys(position, batch));
  taken.require(taken.sampling(sampling, batch, temperature, top_k, top_p, min_p) &&
                taken.edits(batch, edit_ids, edit_counts, edit_bias, penalties) &&
                (!workspace || taken.array(*workspace, ScalarType::Byte, {workspace->size(0)})));
  const Outputs outputs(target_logits, batch, draft_tokens.size(1) + 1, logprobs);
  Tensor counters = make(target_logits, {batch, 2}, aoti_torch_dtype_int32());
  const VerifyChain op{
      .common = verification(target_logits, draft_tokens, draft_logits, draft_stats, seed, position,
                             sampling_of(sampling, temperature, top_k, top_p, min_p),
                             processing_of(bitmask, edit_ids, edit_counts, edit_bias, penalties), outputs, logprobs),
      .cu_rows = data_of<int64_t>(cu_rows),
      .num_draft = ids_of(num_draft),
      .rule = Rule(rule),
      .independent = independent,
      .out_counters = out<int32_t>(counters),
      .workspace = workspace ? workspace->mutable_data_ptr() : nullptr,
      .workspace_bytes = workspace ? workspace->size(0) : 0,
  };
  run(op, target_logits);
  return {outputs.tokens, outputs.accepted, outputs.valid, counters, outputs.scores, outputs.raw};
}

// `sample`, likewise.
template <auto run>
std::tuple<Tensor, Tensor, Tensor> sample_by(Tensor logits, Tensor seed, Tensor position, Tensor row,
                                             OptionalTensor sampling, double temperature, int64_t top_k, double top_p,
                                             double min_p, OptionalTensor bitmask, OptionalTensor edit_ids,
                                             OptionalTensor edit_counts, OptionalTensor edit_bias,
                                             OptionalTensor penalties, bool coupled) {
  const Taken taken(logits);
  taken.require(logits.dim() == 2);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  taken.require(taken.logits(logits, {rows, vocab}) && taken.keys(seed, rows) && taken.keys(position, rows) &&
                taken.keys(row, rows) && taken.sampling(sampling, rows, temperature, top_k, top_p, min_p) &&
                taken.array(bitmask, ScalarType::Int, {rows, (vocab + 31) / 32}) &&
                taken.edits(rows, edit_ids, edit_counts, edit_bias, penalties));
  const Draws draws(logits, {rows});
  const Sample op = sample_of(logits, seed, position, row, sampling_of(sampling, temperature, top_k, top_p, min_p),
                              processing_of(bitmask, edit_ids, edit_counts, edit_bias, penalties), coupled, draws);
  run(op, logits);
  return {draws.tokens, draws.logprobs, draws.stats};
}

// `verify_tree`, likewise.
template <auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> verify_tree_of(
    Tensor target_logits, Tensor draft_tokens, Tensor parents, OptionalTensor draft_logits, OptionalTensor draft_stats,
    Tensor seed, Tensor position, OptionalTensor sampling, double temperature, int64_t top_k, double top_p,
    double min_p, OptionalTensor bitmask, OptionalTensor edit_ids, OptionalTensor edit_counts, OptionalTensor edit_bias,
    OptionalTensor penalties, int64_t rule, bool replacement, bool logprobs) {
  const Outputs outputs(target_logits, parents.size(0), parents.size(1), logprobs);
  Tensor nodes = make(target_logits, {parents.size(0), parents.size(1)}, aoti_torch_dtype_int32());
  const VerifyTree op{
      .common = verification(target_logits, draft_tokens, draft_logits, draft_stats, seed, position,
                             sampling_of(sampling, temperature, top_k, top_p, min_p),
                             processing_of(bitmask, edit_ids, edit_counts, edit_bias, penalties), outputs, logprobs),
      .parents = data_of<int64_t>(parents),
      .rule = TreeRule(rule),
      .replacement = replacement,
      .out_nodes = out<int32_t>(nodes),
  };
  run(op, target_logits);
  return {outputs.tokens, nodes, outputs.accepted, outputs.valid, outputs.scores, outputs.raw};
}

// `sample_children`, likewise.
template <auto run>
std::tuple<Tensor, Tensor, Tensor> sample_children_by(Tensor logits, Tensor seed, Tensor position, Tensor row,
                                                      OptionalTensor sampling, double temperature, int64_t top_k,
                                                      double top_p, double min_p, OptionalTensor bitmask,
                                                      OptionalTensor edit_ids, OptionalTensor edit_counts,
                                                      OptionalTensor edit_bias, OptionalTensor penalties, int64_t count,
                                                      int64_t how) {
  const Draws draws(logits, {logits.size(0), count});
  const SampleChildren op{
      sample_of(logits, seed, position, row, sampling_of(sampling, temperature, top_k, top_p, min_p),
                processing_of(bitmask, edit_ids, edit_counts, edit_bias, penalties), false, draws),
      count, Children(how)};
  run(op, logits);
  return {draws.tokens, draws.logprobs, draws.stats};
}

// `noise_words`, likewise.
template <auto run>
Tensor noise_words_of(Tensor seed, Tensor position, int64_t tag, int64_t first, int64_t counters) {
  Tensor words = make(seed, {seed.size(0), 4 * counters}, aoti_torch_dtype_int64());
  const NoiseWords op{.rows = seed.size(0),
                      .first = first,
                      .counters = counters,
                      .tag = uint32_t(tag),
                      .seed = data_of<int64_t>(seed),
                      .position = data_of<int64_t>(position),
                      .out = out<int64_t>(words)};
  run(op, seed);
  return words;
}

// All operators that take part in drafting and verifying, by run(op, a tensor beside which to work).
template <auto run, class Library>
void implement(Library& m) {
  m.impl("verify_chain", TORCH_BOX(&verify_chain_of<run>));
  m.impl("verify_tree", TORCH_BOX(&verify_tree_of<run>));
  m.impl("sample", TORCH_BOX(&sample_by<run>));
  m.impl("sample_children", TORCH_BOX(&sample_children_by<run>));
  m.impl("noise_words", TORCH_BOX(&noise_words_of<run>));
}

}  // namespace specdec
