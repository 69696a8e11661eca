// What the operators take as it is. They may be called before anything was looked at: whatever they could not read
// safely they refuse, and Python (specdec_kernels/ops), whose checks are the normative ones, says what is wrong with it
// or brings it into shape.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "ops.h"

namespace specdec {

// Of any class with the accessors of torch::stable::Tensor.
template <class Tensor>
class ArgumentChecker {
 public:
  using OptionalTensor = std::optional<Tensor>;
  using ScalarType = torch::headeronly::ScalarType;
  using Sizes = std::initializer_list<int64_t>;

  // Everything else has to be where `first` is.
  explicit ArgumentChecker(const Tensor& first) : on_cpu_(first.is_cpu()), device_(first.get_device_index()) {}

  // Rows of logits any stride apart, with at least one token.
  bool logits(const Tensor& t, Sizes sizes) const {
    using enum torch::headeronly::ScalarType;
    if (!tensor(t, sizes, Float, BFloat16, Half)) return false;
    const auto last = t.dim() - 1;
    return t.size(last) > 0 && (t.stride(last) == 1 || t.size(last) == 1);
  }

  // Token ids; of any strides.
  bool ids(const Tensor& t, Sizes sizes) const { return tensor(t, sizes, ScalarType::Long, ScalarType::Int); }

  bool array(const Tensor& t, ScalarType kind, Sizes sizes) const {
    return tensor(t, sizes, kind) && t.is_contiguous();
  }
  bool array(const OptionalTensor& t, ScalarType kind, Sizes sizes) const { return !t || array(*t, kind, sizes); }

  // What the noise is keyed on.
  bool keys(const Tensor& t, int64_t count) const { return array(t, ScalarType::Long, {count}); }

  // Rows of a step; on a GPU looking would synchronise.
  bool rows_of_step(const Tensor& t, int64_t count) const {
    if (!keys(t, count)) return false;
    const auto* row = static_cast<const int64_t*>(t.const_data_ptr());
    return !on_cpu_ || std::all_of(row, row + count, [](int64_t r) { return r >= 0 && r < kMaxRows; });
  }

  // What drafts were drawn from: rows of logits as wide as the target's or, with a table of its ids, of any width. What
  // is in the table is looked at where it is read.
  bool draft_rows(const OptionalTensor& t, const OptionalTensor& stats, const OptionalTensor& target_to_draft,
                  int64_t batch, int64_t rows, int64_t vocab) const {
    if (!t) return !stats && !target_to_draft;
    const int64_t width = target_to_draft && t->dim() == 3 ? t->size(2) : vocab;
    return logits(*t, {batch, rows, width}) && array(stats, ScalarType::Float, {batch, rows, 3}) &&
           array(target_to_draft, ScalarType::Int, {vocab});
  }

  // The tokens of chains, and how many of them count.
  bool drafted(const Tensor& tokens, const OptionalTensor& num_draft) const {
    const int64_t batch = tokens.size(0), longest = tokens.size(1);
    return ids(tokens, {batch, longest}) && longest < kMaxRows &&
           (!num_draft || (ids(*num_draft, {batch}) && num_draft->is_contiguous()));
  }

  // Where the rows of requests begin and end; on a GPU looking would synchronise.
  bool offsets(const Tensor& t, int64_t batch, int64_t longest, int64_t rows) const {
    if (!array(t, ScalarType::Long, {batch + 1})) return false;
    if (!on_cpu_) return true;
    const auto* at = static_cast<const int64_t*>(t.const_data_ptr());
    for (int64_t b = 0; b < batch; ++b)
      if (at[b + 1] <= at[b] || at[b + 1] - at[b] > longest + 1) return false;
    return at[0] == 0 && at[batch] <= rows;
  }

  // Every node but the root hangs from an earlier one, up to the last; their ids are in the vocabulary. On a GPU
  // looking would synchronise.
  bool tree(const Tensor& parents, const Tensor& tokens, int64_t vocab) const {
    const int64_t batch = parents.size(0), nodes = parents.size(1);
    if (nodes == 0 || !array(parents, ScalarType::Long, {batch, nodes}) ||
        !array(tokens, ScalarType::Long, {batch, nodes}))
      return false;
    if (!on_cpu_) return true;
    const auto* up = static_cast<const int64_t*>(parents.const_data_ptr());
    const auto* id = static_cast<const int64_t*>(tokens.const_data_ptr());
    for (int64_t b = 0; b < batch; ++b, up += nodes, id += nodes) {
      const int64_t live = live_nodes(up, nodes);
      if (live == 0) return false;
      for (int64_t n = 1; n < nodes; ++n)
        if (n < live ? id[n] < 0 || id[n] >= vocab : up[n] != -1) return false;
    }
    return true;
  }

  // One a request, or one for all; on a GPU looking would synchronise.
  bool temperatures(const OptionalTensor& each, double all, int64_t count) const {
    const auto fits = [](float x) { return std::isfinite(x) && x >= 0.0f; };
    if (!array(each, ScalarType::Float, {count})) return false;
    if (!each || !on_cpu_) return fits(float(all));
    const auto* own = static_cast<const float*>(each->const_data_ptr());
    return std::all_of(own, own + count, fits);
  }

  bool sampling(const OptionalTensor& each, int64_t count, double temperature, int64_t top_k, double top_p,
                double min_p) const {
    return array(each, ScalarType::Float, {count, 4}) && std::isfinite(float(temperature)) && temperature >= 0.0 &&
           top_k >= 0 && top_p > 0.0 && top_p <= 1.0 && min_p >= 0.0 && min_p <= 1.0;
  }

  // Of `count` requests; all four or none.
  bool adjustments(int64_t count, const OptionalTensor& ids_of_adjustments, const OptionalTensor& counts,
                   const OptionalTensor& bias, const OptionalTensor& penalties) const {
    if (!ids_of_adjustments) return true;
    const int64_t most = ids_of_adjustments->dim() == 2 ? ids_of_adjustments->size(1) : 0;
    return counts && bias && penalties && array(*ids_of_adjustments, ScalarType::Int, {count, most}) &&
           array(*counts, ScalarType::Int, {count, most, 2}) && array(*bias, ScalarType::Float, {count, most}) &&
           array(*penalties, ScalarType::Float, {count, 3});
  }

  // Of this many bytes at least; where kernels lay their scratch out in it, aligned as they expect.
  bool workspace(const OptionalTensor& t, int64_t bytes) const {
    return !t || (array(*t, ScalarType::Byte, {t->size(0)}) && t->size(0) >= bytes &&
                  (on_cpu_ || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % kWorkspaceAlignment == 0));
  }

  static void require(bool fits) {
    STD_TORCH_CHECK(fits, "an argument is not taken as it is: the functions of specdec_kernels say which one and why");
  }

 private:
  template <class... Kinds>
  bool tensor(const Tensor& t, Sizes sizes, Kinds... kinds) const {
    const auto kind = t.scalar_type();
    const auto actual = t.sizes();
    return ((kind == kinds) || ...) && t.is_cpu() == on_cpu_ && t.get_device_index() == device_ &&
           std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end());
  }

  bool on_cpu_;
  int32_t device_;
};

}  // namespace specdec
