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
#include "chain.h"
#include "launch.h"
#include "sample.h"
#include "trees.h"

namespace specdec::cuda {
namespace {

// SPECDEC_EMULATED_PROCESSORS multiprocessors, so that rows are cut; teams in an order of SPECDEC_EMULATED_ORDER's own.
int64_t setting(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoll(value) : otherwise;
}

template <class F>
void on_team(const F& body) {
#ifdef SPECDEC_EMULATED_THREADS
  Block block(SPECDEC_EMULATED_THREADS);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < SPECDEC_EMULATED_THREADS; ++rank)
    threads.emplace_back([&block, &body, rank] { body(Team(block, rank)); });
  for (std::thread& thread : threads) thread.join();
#else
  body(Team());
#endif
}

// program(team, workspace, index) on all programs of an operation.
template <class Op, class F>
void run_programs(const Op& op, int64_t vocab, const F& program) {
  const Needs needs = needs_of(op);
  const Shape shape = shape_of(needs, vocab, setting("SPECDEC_EMULATED_PROCESSORS", 1));
  std::vector<float> tables(size_t(needs.tables * 2 * shape.entries), NAN);
  std::vector<double> places(size_t(needs.places * kPlaceBytes) / sizeof(double), NAN);
  std::vector<int32_t> counters(size_t(needs.counters), 0);
  const Workspace work{tables.data(), places.data(), counters.data(), shape.slices, shape.entries};
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
  for (const int32_t counter : counters) STD_TORCH_CHECK(counter == 0, "a counter was left at ", counter);
}

template <bool P>
void run_as(const VerifyChain& op, const Team& team, const Workspace& work, int64_t program) {
  switch (op.rule) {
    case Rule::token: return ChainProgram<Rule::token, P>(team, op, work, program).run();
    case Rule::block: return ChainProgram<Rule::block, P>(team, op, work, program).run();
    case Rule::coupled: return ChainProgram<Rule::coupled, P>(team, op, work, program).run();
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
  run_programs(op, like.size(like.dim() - 1), [&](const Team& team, const Workspace& work, int64_t program) {
    processes(op) ? run_as<true>(op, team, work, program) : run_as<false>(op, team, work, program);
  });
}

void run(const NoiseWords& op, const Tensor&) {
  for (int64_t index = 0; index < op.rows * op.counters; ++index) noise_program(op, index);
}

STABLE_TORCH_LIBRARY_IMPL(specdec_emulated, CPU, m) {
  implement<[](const auto& op, const Tensor& like) { run(op, like); }>(m);
}

}  // namespace
}  // namespace specdec::cuda
