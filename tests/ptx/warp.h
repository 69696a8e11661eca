// A warp, its memory, and an instruction.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "order.h"

constexpr int LANES = 32;
constexpr uint32_t ALL = ~0u;

struct Warp;
struct Instruction;
// What an instruction does for its active lanes.
using Step = std::function<void(Warp&, const Instruction&, uint32_t active)>;
using Lanes = std::array<uint64_t, LANES>;

struct Instruction {
  std::string name;
  Step step;
  int guard = -1;  // a register, and whether it has to be false
  bool negated = false;
  int64_t immediate = 0;  // of an address, the instruction that a branch leads to, how many groups may be open
  uint32_t line = 0;
  bool gathers = false, masked = false;  // lanes that do it together: all, or those of its last operand
  std::vector<int> operands;
};

[[noreturn]] inline void fail(const Instruction& by, const std::string& what) {
  fail("line " + std::to_string(by.line) + ": " + what);
}

// By name, without modifiers.
using Table = std::map<std::string, Step>;

struct Block {
  std::vector<uint8_t> shared;
  Order order;
  std::vector<Warp> warps;
};

struct Global {
  std::vector<std::pair<uint64_t, uint64_t>> regions;
  std::pair<uint64_t, uint64_t> last;  // the one that was touched
  Order order;
  std::unordered_map<uint64_t, Clock> released;  // what is known to who acquires what lies at an address
};

struct Vote {  // of all threads of a block, by a barrier: each one's, and where the result goes
  int mine = -1, any = -1;
};

using Later = std::function<void()>;

struct Warp {
  Global* global;
  Block* block;
  int rank;     // in its block
  Clock clock;  // what it knows of all warps
  uint32_t number;
  std::vector<Lanes> registers;
  std::vector<uint8_t> own{};  // memory of each lane: parameters of the kernel, and of functions
  Clock seen{}, fenced{};      // what a fence acquires, as it lay where this looked; what was known at the last one
  int common = 0;              // the next instruction of all lanes, or -1 where they went apart
  std::array<int, LANES> next{};
  uint32_t running = ALL;
  bool waits = false;
  Vote vote{};
  // By groups, of which the last is open: copies by cp.async, products by wgmma.
  std::deque<std::vector<Later>> copies{{}}, products{{}};

  Lanes& lanes(int reg) { return registers[reg]; }

  Epoch now(const Instruction& by, uint32_t lane) const { return {number, clock[number], by.line, lane, 0}; }

  // `lane`: who touches it; SEVERAL, where all do together.
  uint8_t* at_global(uint64_t address, size_t bytes, Access access, const Instruction& by, uint32_t lane) {
    auto inside = [=](const auto& region) { return address >= region.first && address + bytes <= region.second; };
    if (!inside(global->last)) {
      auto behind = std::ranges::upper_bound(global->regions, std::pair(address, ~uint64_t{0}));
      if (behind == global->regions.begin() || !inside(*--behind)) fail(by, "no tensor has this memory");
      global->last = *behind;
    }
    global->order.touch(address, bytes, access, clock, now(by, lane));
    return reinterpret_cast<uint8_t*>(address);
  }

  uint8_t* at_shared(uint32_t address, size_t bytes, Access access, const Instruction& by, uint32_t lane) {
    if (address + bytes > block->shared.size()) fail(by, "beyond shared memory");
    block->order.touch(address, bytes, access, clock, now(by, lane));
    return &block->shared[address];
  }

  // Who has the same value may write it too.
  void store_shared(uint32_t address, const void* made, size_t bytes, const Instruction& by, uint32_t lane) {
    const bool inside = address + bytes <= block->shared.size();
    if (inside && !std::memcmp(&block->shared[address], made, bytes)) return;
    std::memcpy(at_shared(address, bytes, Access::WRITE, by, lane), made, bytes);
  }

  uint8_t* at_own(uint64_t address, size_t bytes, const Instruction& by, uint32_t lane) {
    if (address + bytes > own.size() / LANES) fail(by, "beyond parameters");
    return &own[lane * (own.size() / LANES) + address];
  }
};

template <class F>
void each_lane(uint32_t active, F f) {
  if (active == ALL)
    for (int lane = 0; lane < LANES; ++lane) f(lane);
  else
    for (; active; active &= active - 1) f(std::countr_zero(active));
}

// With whom a lane does what lanes do together; those that have ended are not waited for.
inline uint32_t companions(Warp& warp, const Instruction& by, int lane) {
  return warp.running & (by.masked ? static_cast<uint32_t>(warp.lanes(by.operands.back())[lane]) : ALL);
}

// Instructions that lanes do together, behind which each knows what the others did before.
inline void together(Warp& warp, const Instruction& by, uint32_t active) {
  each_lane(active, [&](int lane) {
    if (companions(warp, by, lane) != active) fail(by, "not all lanes are here");
  });
  if (++warp.clock[warp.number] >> 20) fail(by, "more steps than are told apart");
}

// What is asynchronous: who closes a group of it, and who waits until no more than so many are left.
inline Step close(std::deque<std::vector<Later>> Warp::* groups) {
  return [=](Warp& warp, const Instruction&, uint32_t) { (warp.*groups).emplace_back(); };
}

inline Step wait(std::deque<std::vector<Later>> Warp::* groups) {
  return [=](Warp& warp, const Instruction& by, uint32_t) {
    for (auto& all = warp.*groups; std::ssize(all) - 1 > by.immediate; all.pop_front())
      for (const Later& each : all.front()) each();
  };
}
