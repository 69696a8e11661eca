// Registers the tree operators with PyTorch; see ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "kv.h"
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

void compact_kv_cpu(std::vector<Tensor> caches, Tensor nodes, Tensor start, std::optional<Tensor> page_table) {
  const Tensor& first = caches[0];
  const bool paged = page_table.has_value();
  const int64_t size = first.element_size();
  const CompactKv op{
      .batch = nodes.size(0),
      .nodes = nodes.size(1),
      .heads = first.size(paged ? 2 : 1),
      .row_bytes = first.size(3) * size,
      .head_stride = first.stride(paged ? 2 : 1) * size,
      .token_stride = first.stride(paged ? 1 : 2) * size,
      .outer_stride = first.stride(0) * size,
      .path = static_cast<const int64_t*>(nodes.const_data_ptr()),
      .start = static_cast<const int64_t*>(start.const_data_ptr()),
      .page_table = paged ? static_cast<const int64_t*>(page_table->const_data_ptr()) : nullptr,
      .pages_a_request = paged ? page_table->size(1) : 0,
      .page_size = paged ? first.size(1) : 1,
  };
  // Less than this is done before a second thread is there.
  constexpr int64_t kSerialBytes = 1 << 17;
  const int64_t work = int64_t(caches.size()) * op.batch, bytes = op.nodes * op.heads * op.row_bytes;
  torch::stable::parallel_for(0, work, 1 + kSerialBytes / (1 + bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      compact_kv(op, static_cast<char*>(caches[size_t(i / op.batch)].mutable_data_ptr()), i % op.batch);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("tree_mask", TORCH_BOX(&tree_mask_cpu));
  m.impl("compact_kv", TORCH_BOX(&compact_kv_cpu));
}

}  // namespace specdec
