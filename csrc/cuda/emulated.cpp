// The same programs on a CPU: how tests hold them against the oracle where there is no GPU. Those of a crew run side by
// side, the others one after the other. What it does not show is what depends on the machine: the shuffles of a warp,
// and how programs that run by rows see each other's writes.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../common/elements.h"
#include "../common/operators.h"
#include "../common/tree_operators.h"
#include "crew.h"
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

// body(team) by the threads of `blocks` blocks that run side by side, each block with a number.
template <class F>
void on_teams(int64_t blocks, const F& body) {
  if (blocks * kThreads == 1) {
    Block block;
    return body(Team(block, 0), 0);
  }
  std::vector<std::unique_ptr<Block>> all;
  std::vector<std::thread> threads;
  threads.reserve(size_t(blocks) * kThreads);
  for (int64_t number = 0; number < blocks; ++number) {
    Block& block = *all.emplace_back(std::make_unique<Block>());
    for (int rank = 0; rank < kThreads; ++rank)
      threads.emplace_back([&block, &body, rank, number] { body(Team(block, rank), number); });
  }
  for (std::thread& thread : threads) thread.join();
}

template <class Op>
void run_as(const Op& op, const Team& team, const Workspace& work, const Part& part) {
  with_program(op, [&](auto type) { typename decltype(type)::type(team, op, work, part).run(); });
}

template <class Op>
void run(const Op& op, const Tensor&) {
  const Device device{setting("SPECDEC_EMULATED_PROCESSORS", 1)};
  const Needs needs = needs_of(op, device);
  const Shape shape = shape_of(op, device);
  std::vector<Four> tables(size_t(needs.tables * 2 * shape.entries) / 4, Four{NAN, NAN, NAN, NAN});
  std::vector<Four> places(size_t(needs.places * kPlaceBytes) / sizeof(Four), Four{NAN, NAN, NAN, NAN});
  std::vector<int32_t> counters(size_t(needs.counters), 0);
  Scratch scratch{tables.data()->x, places.data(), counters.data()};
  if (const auto [memory, bytes] = handed(op); memory != nullptr) {
    const Layout layout(needs, shape);
    STD_TORCH_CHECK(bytes >= layout.bytes(), "workspace must have at least ", layout.bytes(), " bytes, got ", bytes);
    scratch = layout.in(memory, bytes);
  }
  const Workspace work = workspace_of(shape, scratch);
  if (by_crews(op)) {
    for (int64_t request = 0; request < requests_of(common_of(op)); ++request)
      on_teams(shape.slices,
               [&](const Team& team, int64_t block) { run_as(op, team, work, {int(request), 0, int(block)}); });
  } else {
    std::vector<int64_t> order(size_t(shape.programs));
    std::iota(order.begin(), order.end(), int64_t(0));
    if (const int64_t seed = setting("SPECDEC_EMULATED_ORDER", 0))
      std::shuffle(order.begin(), order.end(), std::mt19937_64(uint64_t(seed)));
    on_teams(1, [&](const Team& team, int64_t) {
      for (const int64_t index : order) {
        run_as(op, team, work, part_of(op, unsigned(index), unsigned(shape.slices)));
        team.sync();  // what one program wrote, the next reads
      }
    });
  }
  for (int64_t i = 0; i < needs.counters; ++i)
    STD_TORCH_CHECK(scratch.counters[i] == 0, "a counter was left at ", scratch.counters[i]);
}

void run(const NoiseWords& op, const Tensor&) {
  for (int64_t index = 0; index < op.rows * op.counters; ++index) noise_program(op, index);
}

void run(const TreeMask& op, const Tensor&) {
  with_program(op, [&](auto type) {
    on_teams(1, [&](const Team& team, int64_t) {
      const int64_t programs = programs_a_request(op, team.size());
      for (int64_t p = 0; p < op.batch * programs; ++p) typename decltype(type)::type(team, op, p, programs).run();
    });
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
