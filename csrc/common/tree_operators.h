// From PyTorch's arguments to the structs of trees.h; see operators.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "trees.h"

namespace specdec {

inline MaskElement element_of(const torch::stable::Tensor& out) {
  using torch::headeronly::ScalarType;
  switch (out.scalar_type()) {
    case ScalarType::Bool: return MaskElement::bool8;
    case ScalarType::Byte: return MaskElement::byte;
    case ScalarType::Short: return MaskElement::word16;
    case ScalarType::Int: return MaskElement::word32;
    case ScalarType::BFloat16: return MaskElement::bf16;
    case ScalarType::Half: return MaskElement::f16;
    default: return MaskElement::f32;
  }
}

// `tree_mask` by run(op, a tensor beside which to work).
template <auto run>
void tree_mask_of(torch::stable::Tensor out, torch::stable::Tensor parents,
                  std::optional<torch::stable::Tensor> context_lens, int64_t format) {
  const int64_t batch = parents.size(0);
  const TreeMask op{
      .batch = batch,
      .nodes = parents.size(1),
      .capacity = int64_t(out.numel()) / batch,
      .parents = static_cast<const int64_t*>(parents.const_data_ptr()),
      .context_lens = context_lens ? static_cast<const int64_t*>(context_lens->const_data_ptr()) : nullptr,
      .format = MaskFormat(format),
      .element = element_of(out),
      .out = out.mutable_data_ptr(),
  };
  run(op, out);
}

// `compact_kv` by run(op, the caches, one of them).
template <auto run>
void compact_kv_of(std::vector<torch::stable::Tensor> caches, torch::stable::Tensor nodes, torch::stable::Tensor start,
                   std::optional<torch::stable::Tensor> page_table) {
  const torch::stable::Tensor& first = caches[0];
  const bool paged = page_table.has_value();
  const int64_t size = int64_t(first.element_size()), pages = paged ? page_table->size(1) : 0;
  const CompactKv op{
      .batch = nodes.size(0),
      .nodes = nodes.size(1),
      .heads = first.size(paged ? 2 : 1),
      .row_bytes = first.size(3) * size,
      .head_stride = first.stride(paged ? 2 : 1) * size,
      .token_stride = first.stride(paged ? 1 : 2) * size,
      .outer_stride = first.stride(0) * size,
      .tokens = paged ? pages * first.size(1) : first.size(2),
      .outer = first.size(0),
      .path = static_cast<const int64_t*>(nodes.const_data_ptr()),
      .start = static_cast<const int64_t*>(start.const_data_ptr()),
      .page_table = paged ? static_cast<const int64_t*>(page_table->const_data_ptr()) : nullptr,
      .pages_a_request = pages,
      .page_size = paged ? first.size(1) : 1,
  };
  std::vector<char*> data;
  data.reserve(caches.size());
  for (const auto& cache : caches) data.push_back(static_cast<char*>(cache.mutable_data_ptr()));
  run(op, data, first);
}

// Both, by run(op, ..., a tensor beside which to work).
template <auto run, class Library>
void implement_trees(Library& m) {
  m.impl("tree_mask", TORCH_BOX(&tree_mask_of<run>));
  m.impl("compact_kv", TORCH_BOX(&compact_kv_of<run>));
}

}  // namespace specdec
