// A GPU that takes its time: it executes PTX, what Triton and nvcc hand NVIDIA's assembler, some instructions of one
// warp after some of another, in an order drawn by chance, and fails where two warps, or lanes of one, touch a byte
// with nothing that orders them.
//
// It knows what Triton 3.6 to 3.9 and nvcc 13.0 write of our kernels for sm_90. Whatever else it meets is an error.
// Copies and products that are asynchronous happen as late as they may, where they are waited for.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "collectives.h"
#include "memory.h"

namespace {

template <class F>
void go(Warp& warp, uint32_t active, F to) {
  if (warp.common >= 0) warp.next.fill(std::exchange(warp.common, -1));
  each_lane(active, [&](int lane) { warp.next[lane] = to(lane); });
}

// The warp waits for its block, at a barrier of so many operands, one of them its number.
void wait_for_block(Warp& warp, const Instruction& by, uint32_t active, int number, size_t operands) {
  together(warp, by, active);
  if (warp.lanes(number)[0] || by.operands.size() > operands) fail(by, "a barrier of a part of a block");
  warp.waits = true;
}

Table made_table() {
  Table table;
  add_lanewise(table);
  add_collectives(table);
  add_fence_and_copies(table);
  for (const char* idle : {"nanosleep.u32", "wgmma.fence", "fence.proxy.async.shared::cta"})
    table[idle] = [](Warp&, const Instruction&, uint32_t) {};
  table["bra"] = [](Warp& warp, const Instruction& by, uint32_t active) {
    const int to = static_cast<int>(by.immediate);
    if (warp.common >= 0 && active == warp.running) {
      warp.common = to;
      return;
    }
    go(warp, active, [&](int) { return to; });
  };
  table["return"] = [](Warp& warp, const Instruction& by, uint32_t active) {  // of a function, to who called it
    go(warp, active, [&](int lane) { return static_cast<int>(warp.lanes(by.operands[0])[lane]); });
  };
  table["ret"] = [](Warp& warp, const Instruction&, uint32_t active) { warp.running &= ~active; };
  table["bar"] = [](Warp& warp, const Instruction& by, uint32_t active) {
    wait_for_block(warp, by, active, by.operands[0], 1);
  };
  table["bar.red.or.pred"] = [](Warp& warp, const Instruction& by, uint32_t active) {
    wait_for_block(warp, by, active, by.operands[1], 3);
    warp.vote = {.mine = by.operands[2], .any = by.operands[0]};
  };
  return table;
}

// The step of a name with its modifiers, such as ld.global.v4.b32 or atom.global.gpu.acq_rel.add.u32.
Step step_of(const std::string& name) {
  static const Table table = made_table();
  static const std::vector<std::string> IGNORED{"rn", "rzi", "ftz", "sync", "aligned", "lo", "uni", "gpu"};
  std::vector<std::string> parts;
  std::stringstream all(name);
  for (std::string part; std::getline(all, part, '.');)
    if (std::ranges::find(IGNORED, part) == IGNORED.end() && !part.starts_with("L1::")) parts.push_back(part);
  std::string plain = parts[0];
  for (size_t i = 1; i < parts.size(); ++i) plain += "." + parts[i];
  if (auto found = table.find(plain); found != table.end()) return found->second;
  if (Step access = step_of_access(parts)) return access;
  fail("nothing is known of " + name);
}

struct Program {
  std::vector<Instruction> instructions;
  std::vector<Lanes> registers;  // as they are at the begin
  size_t own = 0;                // bytes of each lane
};

Program read(const char* text) {
  Program program;
  std::istringstream in(text);
  size_t registers = 0, constants = 0;
  in >> registers >> program.own >> constants;
  Lanes unknown;
  unknown.fill(0xdeadbeefdeadbeef);
  program.registers.assign(registers, unknown);
  for (uint64_t reg = 0, bits = 0; constants && in >> reg >> bits; --constants) program.registers[reg].fill(bits);
  std::unordered_map<std::string, Step> steps;
  int count = 0;
  for (Instruction each; in >> each.name >> each.guard >> each.negated >> each.immediate >> each.line >> count;) {
    each.operands.resize(count);
    for (int& operand : each.operands) in >> operand;
    if (!steps.contains(each.name)) steps[each.name] = step_of(each.name);
    each.step = steps[each.name];
    const std::string kind = each.name.substr(0, each.name.find('.'));
    each.masked = kind == "shfl" || kind == "vote" || kind == "redux" || each.name.starts_with("bar.warp");
    each.gathers = each.masked || kind == "bar" || each.name.find(".sync") != std::string::npos;
    program.instructions.push_back(each);
  }
  return program;
}

// The lanes that are furthest behind, but for those that wait for others at what they do together.
uint32_t furthest_behind(Warp& warp, const std::vector<Instruction>& program) {
  const Instruction* waited_at = nullptr;
  for (uint32_t left = warp.running, lanes = 0; left; left &= ~lanes) {
    int at = std::numeric_limits<int>::max();
    each_lane(left, [&](int lane) { at = std::min(at, warp.next[lane]); });
    lanes = 0;
    each_lane(left, [&](int lane) { lanes |= uint32_t{warp.next[lane] == at} << lane; });
    const Instruction& instruction = program.at(at);
    if (!instruction.gathers || !(companions(warp, instruction, std::countr_zero(lanes)) & ~lanes)) return lanes;
    if (!waited_at) waited_at = &instruction;
  }
  fail(*waited_at, "not all lanes are here");
}

// One instruction of some lanes; false where the warp waits or has ended.
bool advance(Warp& warp, const std::vector<Instruction>& program) {
  if (!warp.running) return false;
  uint32_t lanes = warp.running;
  int at = warp.common;
  if (at >= 0) {
    ++warp.common;
  } else {
    lanes = furthest_behind(warp, program);
    at = warp.next[std::countr_zero(lanes)];
    each_lane(lanes, [&](int lane) { ++warp.next[lane]; });
  }
  const Instruction& instruction = program.at(at);
  uint32_t active = lanes;
  if (instruction.guard >= 0) {
    const Lanes& set = warp.lanes(instruction.guard);
    each_lane(lanes, [&](int lane) { active ^= uint32_t{(set[lane] & 1) == instruction.negated} << lane; });
  }
  if (active) instruction.step(warp, instruction, active);
  if (warp.common < 0 && warp.running) {
    const int first = warp.next[std::countr_zero(warp.running)];
    bool together = true;
    each_lane(warp.running, [&](int lane) { together &= warp.next[lane] == first; });
    if (together) warp.common = first;
  }
  return !warp.waits && warp.running;
}

// All warps of a block are at a barrier, or have ended: what each did before is known to all.
void meet(Block& block) {
  Clock all(block.warps[0].clock.size());
  bool any = false;
  for (Warp& warp : block.warps) {
    if (!warp.waits) fail("a barrier without a warp that has ended");
    if ((warp.vote.mine < 0) != (block.warps[0].vote.mine < 0)) fail("a barrier at which not all warps vote");
    join(all, warp.clock);
    if (warp.vote.mine >= 0) each_lane(warp.running, [&](int lane) { any |= warp.lanes(warp.vote.mine)[lane] & 1; });
  }
  for (Warp& warp : block.warps) {
    warp.clock = all;
    ++warp.clock[warp.number];
    warp.waits = false;
    if (warp.vote.mine >= 0) warp.lanes(warp.vote.any).fill(any);
    warp.vote = {};
  }
}

struct Grid {
  uint32_t size[3];
  int warps, shared, resident;
  uint32_t seed;
  uint64_t limit;  // instructions of warps
};

// What is left of blocks that have ended, for those that come after them: registers, which cost more to make than many
// a warp does; and, by warps that are told apart, the clocks. Of more blocks than that some that follow each other are
// taken for one.
struct Ended {
  static constexpr uint32_t MOST_WARPS = 4095;
  Clock clocks;
  std::vector<std::vector<Lanes>> registers;
};

// Registers 0 to 6: the thread, the block in three dimensions, and how many blocks there are.
std::unique_ptr<Block> begin(const Program& program, const Grid& grid, Global& global, Ended& ended, uint32_t number,
                             std::string_view parameters) {
  auto block = std::make_unique<Block>();
  block->shared.assign(grid.shared, 0xa5);
  const size_t warps = ended.clocks.size();
  for (int rank = 0; rank < grid.warps; ++rank) {
    const auto own = static_cast<uint32_t>((number * grid.warps + rank) % warps);
    Warp warp{&global, block.get(), rank, Clock(warps), own, {}};
    warp.clock[own] = ended.clocks[own] + 1;
    if (ended.registers.empty()) ended.registers.push_back(program.registers);
    warp.registers = std::move(ended.registers.back());
    ended.registers.pop_back();
    const uint32_t at[3] = {number % grid.size[0], number / grid.size[0] % grid.size[1],
                            number / grid.size[0] / grid.size[1]};
    for (int lane = 0; lane < LANES; ++lane) warp.lanes(0)[lane] = rank * LANES + lane;
    for (int i = 0; i < 3; ++i) warp.lanes(1 + i).fill(at[i]), warp.lanes(4 + i).fill(grid.size[i]);
    warp.own.resize(LANES * program.own);
    for (int lane = 0; lane < LANES; ++lane) std::ranges::copy(parameters, warp.own.begin() + lane * program.own);
    warp.seen = warp.fenced = Clock(warps);
    block->warps.push_back(std::move(warp));
  }
  return block;
}

void run(const Program& program, const Grid& grid, Global& global, std::string_view parameters) {
  std::mt19937 random(grid.seed);
  const uint32_t total = grid.size[0] * grid.size[1] * grid.size[2];
  const uint32_t apart = std::min(total, Ended::MOST_WARPS / grid.warps);
  if (std::cmp_greater(std::min<uint32_t>(grid.resident, total), apart)) fail("more warps than are told apart");
  Ended ended{Clock(apart * grid.warps), {}};
  std::vector<bool> is_there(apart);
  std::vector<std::unique_ptr<Block>> resident;
  uint64_t steps = 0;
  for (uint32_t next = 0; next < total || !resident.empty();) {
    for (; next < total && std::ssize(resident) < grid.resident && !is_there[next % apart]; ++next) {
      is_there[next % apart] = true;
      resident.push_back(begin(program, grid, global, ended, next, parameters));
    }
    const size_t chosen = random() % resident.size();
    Block& block = *resident[chosen];
    std::vector<Warp*> ready;
    for (Warp& warp : block.warps)
      if (warp.running && !warp.waits) ready.push_back(&warp);
    if (ready.empty()) {
      if (std::ranges::any_of(block.warps, [](const Warp& warp) { return warp.running; })) {
        meet(block);
        continue;
      }
      for (Warp& warp : block.warps) {
        ended.clocks[warp.number] = warp.clock[warp.number];
        ended.registers.push_back(std::move(warp.registers));
      }
      is_there[block.warps[0].number / grid.warps] = false;
      resident.erase(resident.begin() + static_cast<ptrdiff_t>(chosen));
      continue;
    }
    Warp& warp = *ready[random() % ready.size()];
    for (uint32_t quantum = 1 + random() % 400; quantum; --quantum) {
      if (++steps > grid.limit) fail("no end in sight");
      if (!advance(warp, program.instructions)) break;
    }
  }
}

}  // namespace

// A program as tests/helpers/ptx.py writes it; nullptr, with what is wrong in `error`, where it is not known.
extern "C" Program* ptx_read(const char* text, char* error, int size) try {
  return new Program(read(text));
} catch (const std::exception& failure) {
  std::snprintf(error, size, "%s", failure.what());
  return nullptr;
}

// Regions are pairs of addresses, in their order. False with what is wrong in `error`.
extern "C" bool ptx_run(const Program* program, const Grid* grid, const uint64_t* regions, int region_count,
                        const char* parameters, int parameter_bytes, char* error, int size) try {
  Global global;
  for (int i = 0; i < region_count; ++i) global.regions.emplace_back(regions[2 * i], regions[2 * i + 1]);
  run(*program, *grid, global, {parameters, static_cast<size_t>(parameter_bytes)});
  return true;
} catch (const std::exception& failure) {
  std::snprintf(error, size, "%s", failure.what());
  return false;
}
