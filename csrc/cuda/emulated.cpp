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
#include "launch.h"
#include "programs.h"

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

template <class F>
void run(int64_t rows, int64_t tables, int64_t vocab, int64_t counted, const F& program) {
  const Shape shape = shape_of(rows, vocab, setting("SPECDEC_EMULATED_PROCESSORS", 1));
  std::vector<float> table(size_t(rows * tables * 2 * shape.entries), NAN);
  std::vector<Judged> judged(size_t(rows), Judged{});
  std::vector<int32_t> counters(size_t(counted), 0);
  const Workspace work{table.data(), judged.data(), counters.data(), shape.slices, shape.entries};
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

template <Rule kRule, bool P>
void run_chain_as(const VerifyChain& op) {
  const int64_t rows = op.common.batch * op.common.rows;
  run(rows, 2, op.common.vocab, counters_of(op), [&](const Team& team, const Workspace& work, int64_t program) {
    ChainProgram<kRule, P>(team, op, work, program).run();
  });
}

template <bool P>
void run_chain_by_rule(const VerifyChain& op) {
  switch (op.rule) {
    case Rule::token: return run_chain_as<Rule::token, P>(op);
    case Rule::block: return run_chain_as<Rule::block, P>(op);
    case Rule::coupled: return run_chain_as<Rule::coupled, P>(op);
  }
}

void run_chain(const VerifyChain& op, const Tensor&) {
  processes(op.common.processing) ? run_chain_by_rule<true>(op) : run_chain_by_rule<false>(op);
}

void run_sample(const Sample& op, const Tensor&) {
  run(op.rows, 1, op.vocab, counters_of(op), [&](const Team& team, const Workspace& work, int64_t program) {
    processes(op.processing) ? sample_program<true>(team, op, work, program)
                             : sample_program<false>(team, op, work, program);
  });
}

void run_noise_words(const NoiseWords& op, const Tensor&) {
  for (int64_t index = 0; index < op.rows * op.counters; ++index) noise_program(op, index);
}

STABLE_TORCH_LIBRARY_IMPL(specdec_emulated, CPU, m) {
  m.impl("verify_chain", TORCH_BOX(&verify_chain_of<run_chain>));
  m.impl("sample", TORCH_BOX(&sample_by<run_sample>));
  m.impl("noise_words", TORCH_BOX(&noise_words_of<run_noise_words>));
}

}  // namespace
}  // namespace specdec::cuda
