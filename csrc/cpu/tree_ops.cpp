// Registers the tree operators with PyTorch; see ops.cpp.
#include <torch/csrc/stable/ops.h>

#include "../common/tree_operators.h"
#include "tree.h"

namespace specdec {
namespace {

using torch::stable::Tensor;

void run(const TreeMask& op, const Tensor&) {
  torch::stable::parallel_for(0, op.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) tree_mask(op, b);
  });
}

void run(const CompactKv& op, const std::vector<char*>& caches, const Tensor&) {
  // Less than this is done before a second thread is there.
  constexpr int64_t kSerialBytes = 1 << 17;
  const int64_t work = int64_t(caches.size()) * op.batch, bytes = op.nodes * op.heads * op.row_bytes;
  torch::stable::parallel_for(0, work, 1 + kSerialBytes / (1 + bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) compact_kv(op, caches[size_t(i / op.batch)], i % op.batch);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  implement_trees<[](const auto&... arguments) { run(arguments...); }>(m);
}

}  // namespace specdec
