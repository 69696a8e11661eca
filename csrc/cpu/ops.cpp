// Registers the CPU kernels with PyTorch. The schemas are in specdec_kernels/ops/schema.py. Stable ABI: one build
// serves torch 2.10 and later.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../common/entries.h"
#include "../common/operators.h"
#include "../common/tree_operators.h"
#include "pool.h"
#include "verify.h"

namespace specdec {
namespace {

void run(const VerifyChain& op, int32_t) {
  require_kernels();
  ArgumentChecker<Tensor>::require(ids_in_range(op));
  verify_chain(op, torch::stable::get_num_threads(), on_threads);
}

void run(const Sample& op, int32_t) {
  require_kernels();
  sample(op, torch::stable::get_num_threads(), on_threads);
}

void run(const VerifyTree& op, int32_t) {
  require_kernels();
  verify_tree(op, torch::stable::get_num_threads(), on_threads);
}

void run(const SampleChildren& op, int32_t) {
  require_kernels();
  sample_children(op, torch::stable::get_num_threads(), on_threads);
}

void run(const NoiseWords& op, int32_t) {
  const Kernels& table = require_kernels();
  std::vector<uint32_t> buffer(size_t(4 * op.counters));
  for (int64_t r = 0; r < op.rows; ++r) {
    const Noise noise{uint64_t(op.seed[r]), uint64_t(op.position[r]), op.tag};
    table.words(noise, uint32_t(op.first), op.counters, buffer.data());
    std::copy(buffer.begin(), buffer.end(), op.out + r * 4 * op.counters);
  }
}

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
  implement<[](const auto& op, const Tensor&) { run(op, 0); }>(m);
  implement_trees<[](const auto&... arguments) { run(arguments...); }>(m);
}

}  // namespace specdec

// For who calls without the dispatcher.
extern "C" __attribute__((visibility("default"))) const specdec::Entries* specdec_entries() {
  return specdec::entries_of<[](const auto& op, int32_t device) { specdec::run(op, device); }>();
}

// For `specdec doctor`, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* specdec_cpu_isa() {
  const specdec::Kernels* table = specdec::kernels();
  return table ? table->name : "none";
}
