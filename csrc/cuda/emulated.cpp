// The same programs on a CPU, one after the other: how tests hold them against the oracle where there is no GPU. What
// it does not show is what depends on the machine: the shuffles of a warp, and how programs that run at a time see each
// other's writes.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../common/elements.h"
#include "../common/operators.h"
#include "../common/tree_operators.h"
#include "chain.h"
#include "launch.h"
#include "masks.h"
#include "sample.h"
#include "trees.h"

namespace specdec::cuda {
namespace {

// SPECDEC_EMULATED_PROCESSORS multiprocessors, so that rows are cut; teams in an order of SPECDEC_EMULATED_ORDER's own.
int64_t setting(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value ? std::strtoll(value, nullptr, 10) : otherwise;
}

template <class F>
void on_team(const F& body) {
#ifdef SPECDEC_EMULATED_THREADS
  Block block(SPECDEC_EMULATED_THREADS);
  std::vector<std::thread> threads;
  threads.reserve(SPECDEC_EMULATED_THREADS);
  for (int rank = 0; rank < SPECDEC_EMULATED_THREADS; ++rank)
    threads.emplace_back([&block, &body, rank] { body(Team(block, rank)); });
  for (std::thread& thread : threads) thread.join();
#else
  Block block(1);
  body(Team(block, 0));
#endif
}

// program(team, workspace, index) on all programs of an operation.
template <class Op, class F>
void run_programs(const Op& op, int64_t vocab, const F& program) {
  const Device device{setting("SPECDEC_EMULATED_PROCESSORS", 1)};
  const Needs needs = needs_of(op, device);
  const Shape shape = shape_of(op, vocab, device);
  std::vector<float> tables(size_t(needs.tables * 2 * shape.entries), NAN);
  std::vector<double> places(size_t(needs.places * kPlaceBytes) / sizeof(double), NAN);
  std::vector<int32_t> counters(size_t(needs.counters), 0);
  Scratch scratch{tables.data(), places.data(), counters.data()};
  if (const auto [memory, bytes] = handed(op); memory != nullptr) {
    const Layout layout(needs, shape);
    STD_TORCH_CHECK(bytes >= layout.bytes(), "workspace must have at least ", layout.bytes(), " bytes, got ", bytes);
    scratch = layout.in(memory, bytes);
  }
  const Workspace work = workspace_of(shape, scratch);
  std::vector<int64_t> order(size_t(shape.programs()));
  std::iota(order.begin(), order.end(), int64_t(0));
  if (const int64_t seed = setting("SPECDEC_EMULATED_ORDER", 0))
    std::shuffle(order.begin(), order.end(), std::mt19937_64(uint64_t(seed)));
  on_team([&](const Team& team) {
    for (const int64_t index : order) {
      program(team, work, index);
      team.sync();  // what one program wrote, the next reads
    }
  });
  for (int64_t i = 0; i < needs.counters; ++i)
    STD_TORCH_CHECK(scratch.counters[i] == 0, "a counter was left at ", scratch.counters[i]);
}

template <Rule kRule, bool P>
void run_chain(const VerifyChain& op, const Team& team, const Workspace& work, int64_t program) {
  ChainProgram<kRule, P>(team, op, work, program).run();
}

template <bool P>
void run_as(const VerifyChain& op, const Team& team, const Workspace& work, int64_t program) {
  switch (op.rule) {
    case Rule::token: return run_chain<Rule::token, P>(op, team, work, program);
    case Rule::block: return run_chain<Rule::block, P>(op, team, work, program);
    case Rule::coupled: return run_chain<Rule::coupled, P>(op, team, work, program);
  }
}

template <bool P>
void run_as(const VerifyTree& op, const Team& team, const Workspace& work, int64_t program) {
  TreeProgram<P>(team, op, work, program).run();
}

template <bool P>
void run_as(const Sample& op, const Team& team, const Workspace& work, int64_t program) {
  RowProgram<P>(team, op, work, program).sample();
}

template <bool P>
void run_as(const SampleChildren& op, const Team& team, const Workspace& work, int64_t program) {
  RowProgram<P>(team, op.common, work, program).sample_children(op.count, op.how);
}

template <class Op>
void run(const Op& op, const Tensor& like) {
  const auto program = [&](const Team& team, const Workspace& work, int64_t index) {
    processes(op) ? run_as<true>(op, team, work, index) : run_as<false>(op, team, work, index);
  };
  run_programs(op, like.size(like.dim() - 1), program);
}

void run(const NoiseWords& op, const Tensor&) {
  for (int64_t index = 0; index < op.rows * op.counters; ++index) noise_program(op, index);
}

template <int kBytes>
void run_mask(const TreeMask& op, const Team& team) {
  const int64_t programs = programs_a_request(op, team.size());
  for (int64_t p = 0; p < op.batch * programs; ++p) MaskProgram<kBytes>(team, op, p, programs).run();
}

void run(const TreeMask& op, const Tensor&) {
  on_team([&](const Team& team) {
    switch (element_bytes(op.element)) {
      case 4: return run_mask<4>(op, team);
      case 2: return run_mask<2>(op, team);
      default: return run_mask<1>(op, team);
    }
  });
}

void run(const CompactKv& op, const std::vector<char*>& data, const Tensor&) {
  Caches caches{};
  const auto count = int64_t(data.size());
  STD_TORCH_CHECK(count <= kCachesALaunch, "the emulation has one launch");
  std::copy(data.begin(), data.end(), caches.data);
  with_kv_unit(op, caches, count, [&](auto unit) {
    const int64_t threads = op.row_bytes / int64_t(sizeof unit) * op.heads * op.batch * count;
    for (int64_t i = 0; i < threads + 7; ++i) compact_kv_program<decltype(unit)>(op, caches, count, i);  // a few more
  });
}

STABLE_TORCH_LIBRARY_IMPL(specdec_emulated, CPU, m) {
  implement<[](const auto& op, const Tensor& like) { run(op, like); }>(m);
  implement_trees<[](const auto&... arguments) { run(arguments...); }>(m);
}

}  // namespace
}  // namespace specdec::cuda
