// Registers the tree operators with PyTorch; see ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "tree.h"

namespace specdec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

MaskElement element_of(const Tensor& out) {
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

void tree_mask_cpu(Tensor out, Tensor parents, std::optional<Tensor> context_lens, int64_t format) {
  const int64_t batch = parents.size(0);
  const TreeMask op{
      .batch = batch,
      .nodes = parents.size(1),
      .room = int64_t(out.numel()) / batch,
      .parents = static_cast<const int64_t*>(parents.const_data_ptr()),
      .context_lens = context_lens ? static_cast<const int64_t*>(context_lens->const_data_ptr()) : nullptr,
      .format = MaskFormat(format),
      .element = element_of(out),
      .out = out.mutable_data_ptr(),
  };
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) tree_mask(op, b);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, m) { m.impl("tree_mask", TORCH_BOX(&tree_mask_cpu)); }

}  // namespace specdec
