// From PyTorch's arguments to the structs of ops.h, for every backend in C++. The schemas are in
// specdec_kernels/ops/schema.py. Stable ABI: one build serves torch 2.10 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "arguments.h"

// Of a call into torch: before 2.13 there is only the one that does not repeat torch's message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace specdec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

  VerifyResults results() const {
    return {out<int64_t>(tokens), out<int32_t>(accepted), out<bool>(valid), out<float>(scores), out<float>(raw)};
  }
};

// What a draw from rows gives back; `shape` of the tokens.
struct Draws {
  Tensor tokens, logprobs, stats;

  Draws(const Tensor& logits, std::initializer_list<int64_t> shape)
      : tokens(make(logits, shape, aoti_torch_dtype_int64())),
        logprobs(make(logits, shape, aoti_torch_dtype_float32())),
        stats(make(logits, {logits.size(0), 3}, aoti_torch_dtype_float32())) {}

  DrawResults results() const { return {out<int64_t>(tokens), out<float>(logprobs), out<float>(stats)}; }
};

// `verify_chain` by run(op, a tensor beside which to work).
template <auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> verify_chain_of(
    Tensor target_logits, Tensor draft_tokens, OptionalTensor draft_logits, OptionalTensor draft_stats,
    OptionalTensor target_to_draft, OptionalTensor draft_temperatures, double draft_temperature, Tensor seed,
    Tensor position, OptionalTensor num_draft, OptionalTensor cu_rows, OptionalTensor sampling, double temperature,
    int64_t top_k, double top_p, double min_p, OptionalTensor bitmask, OptionalTensor edit_ids,
    OptionalTensor edit_counts, OptionalTensor edit_bias, OptionalTensor penalties, int64_t rule, bool logprobs,
    bool independent, OptionalTensor workspace) {
  const ChainArguments<Tensor> arguments{
      target_logits,
      draft_tokens,
      draft_logits,
      draft_stats,
      target_to_draft,
      {draft_temperatures, draft_temperature},
      seed,
      position,
      num_draft,
      cu_rows,
      {sampling, temperature, top_k, top_p, min_p, bitmask, edit_ids, edit_counts, edit_bias, penalties},
      Rule(rule),
      logprobs,
      independent,
      workspace};
  arguments.require();
  const Outputs outputs(target_logits, arguments.batch(), arguments.rows(), logprobs);
  Tensor counters = make(target_logits, {arguments.batch(), 2}, aoti_torch_dtype_int32());
  const VerifyChain op = arguments.op(outputs.results(), out<int32_t>(counters));
  run(op, target_logits);
  return {outputs.tokens, outputs.accepted, outputs.valid, counters, outputs.scores, outputs.raw};
}

// `sample`, likewise.
template <auto run>
std::tuple<Tensor, Tensor, Tensor> sample_by(Tensor logits, OptionalTensor target_to_draft, Tensor seed,
                                             Tensor position, Tensor row, OptionalTensor sampling, double temperature,
                                             int64_t top_k, double top_p, double min_p, OptionalTensor bitmask,
                                             OptionalTensor edit_ids, OptionalTensor edit_counts,
                                             OptionalTensor edit_bias, OptionalTensor penalties, bool coupled) {
  const SampleArguments<Tensor> arguments{
      logits, target_to_draft,
      seed,   position,
      row,    {sampling, temperature, top_k, top_p, min_p, bitmask, edit_ids, edit_counts, edit_bias, penalties},
      coupled};
  arguments.require();
  const Draws draws(logits, {logits.size(0)});
  const Sample op = arguments.op(draws.results());
  run(op, logits);
  return {draws.tokens, draws.logprobs, draws.stats};
}

// `verify_tree`, likewise.
template <auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> verify_tree_of(
    Tensor target_logits, Tensor draft_tokens, Tensor parents, OptionalTensor draft_logits, OptionalTensor draft_stats,
    OptionalTensor target_to_draft, OptionalTensor draft_temperatures, double draft_temperature, Tensor seed,
    Tensor position, OptionalTensor sampling, double temperature, int64_t top_k, double top_p, double min_p,
    OptionalTensor bitmask, OptionalTensor edit_ids, OptionalTensor edit_counts, OptionalTensor edit_bias,
    OptionalTensor penalties, int64_t rule, bool replacement, bool logprobs) {
  const TreeArguments<Tensor> arguments{
      target_logits,
      draft_tokens,
      parents,
      draft_logits,
      draft_stats,
      target_to_draft,
      {draft_temperatures, draft_temperature},
      seed,
      position,
      {sampling, temperature, top_k, top_p, min_p, bitmask, edit_ids, edit_counts, edit_bias, penalties},
      TreeRule(rule),
      replacement,
      logprobs};
  arguments.require();
  const Outputs outputs(target_logits, arguments.batch(), arguments.nodes(), logprobs);
  Tensor nodes = make(target_logits, {arguments.batch(), arguments.nodes()}, aoti_torch_dtype_int32());
  const VerifyTree op = arguments.op(outputs.results(), out<int32_t>(nodes));
  run(op, target_logits);
  return {outputs.tokens, nodes, outputs.accepted, outputs.valid, outputs.scores, outputs.raw};
}

// `sample_children`, likewise.
template <auto run>
std::tuple<Tensor, Tensor, Tensor> sample_children_by(Tensor logits, OptionalTensor target_to_draft, Tensor seed,
                                                      Tensor position, Tensor row, OptionalTensor sampling,
                                                      double temperature, int64_t top_k, double top_p, double min_p,
                                                      OptionalTensor bitmask, OptionalTensor edit_ids,
                                                      OptionalTensor edit_counts, OptionalTensor edit_bias,
                                                      OptionalTensor penalties, int64_t count, int64_t how) {
  const SampleArguments<Tensor> arguments{
      logits, target_to_draft,
      seed,   position,
      row,    {sampling, temperature, top_k, top_p, min_p, bitmask, edit_ids, edit_counts, edit_bias, penalties},
      false};
  arguments.require();
  const Draws draws(logits, {logits.size(0), count});
  const SampleChildren op{arguments.op(draws.results()), count, Children(how)};
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
