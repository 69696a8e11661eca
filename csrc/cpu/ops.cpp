// Registers the CPU kernels with PyTorch. The schemas are in specdec_kernels/reference/schema.py. Stable ABI: one build
// serves torch 2.10 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "../common/entries.h"
#include "../common/operators.h"
#include "../common/tree_operators.h"
#include "kernels.h"
#include "verify.h"

namespace specdec {
namespace {

const Kernels& require_kernels() {
  const Kernels* table = kernels();
  STD_TORCH_CHECK(table != nullptr, "SPECDEC_CPU_ISA must be scalar, avx2 or avx512 and run on this machine, got ",
                  std::getenv("SPECDEC_CPU_ISA"));
  return *table;
}

void on_threads(int64_t threads, void (*body)(void*), void* context) {
  // A range that the pool cuts into fewer pieces than threads is fine: a ThreadGroup does not count on its members.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(context); });
}

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

// float32 [rows, outputs] of x [rows, inputs], x * weight^T * scale: for a drafter, a draft of which takes as long as
// its weights take to read (specdec_kernels/decode/drafters/eight_bits.py).
Tensor eight_bit_product(Tensor x, Tensor weight, Tensor scale) {
  const ArgumentChecker<Tensor> check(x);
  check.require(x.dim() == 2 && weight.dim() == 2);
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  check.require(check.array(x, ScalarType::Float, {rows, inputs}) &&
                check.array(weight, ScalarType::Char, {outputs, inputs}) &&
                check.array(scale, ScalarType::Float, {outputs}));
  const auto *from = data_of<float>(x), *scales = data_of<float>(scale);
  const auto* weights = data_of<int8_t>(weight);
  Tensor result = make(x, {rows, outputs}, aoti_torch_dtype_float32());
  float* const to = out<float>(result);
  const Kernels& table = require_kernels();
  constexpr int64_t kOutputs = 32;  // whose weights stay close while one row after the other is multiplied by them
  torch::stable::parallel_for(0, (outputs + kOutputs - 1) / kOutputs, 1, [&](int64_t first, int64_t last) {
    for (int64_t begin = first * kOutputs; begin < std::min(last * kOutputs, outputs); begin += kOutputs) {
      const int64_t count = std::min(kOutputs, outputs - begin);
      for (int64_t r = 0; r < rows; ++r)
        table.eight_bit_products(weights + begin * inputs, scales + begin, inputs, count, from + r * inputs,
                                 to + r * outputs + begin);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specdec, m) {
  m.def("eight_bit_product(Tensor x, Tensor weight, Tensor scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("eight_bit_product", TORCH_BOX(&eight_bit_product));
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
