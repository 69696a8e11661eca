// Loads, stores and atomic operations.
#pragma once
#include <cstring>

#include "warp.h"

enum class Space { GLOBAL, SHARED, OWN };

struct Form {  // of a load or store
  Space space = Space::GLOBAL;
  bool acquires = false, releases = false, atomic = false, constant = false, is_signed = false;
  int count = 1, bytes = 0;
};

// A number of so many bytes; the compiler knows how many.
inline uint64_t number_at(const uint8_t* from, int bytes) {
  uint64_t number = 0;
  switch (bytes) {
    case 1: std::memcpy(&number, from, 1); break;
    case 2: std::memcpy(&number, from, 2); break;
    case 4: std::memcpy(&number, from, 4); break;
    default: std::memcpy(&number, from, 8);
  }
  return number;
}

// What a warp sees at an address by an atomic access; it acquires that now, or by a later fence.
inline void see(Warp& warp, uint64_t at, bool acquires) {
  const auto found = warp.global->released.find(at);
  if (found == warp.global->released.end()) return;
  join(warp.seen, found->second);
  if (acquires) join(warp.clock, found->second);
}

template <class F>
void at_addresses(Warp& warp, const Instruction& by, uint32_t active, int address, int bytes, F f) {
  each_lane(active, [&](int lane) {
    uint64_t at = warp.lanes(address)[lane] + by.immediate;
    if (at % bytes) fail(by, "not aligned");
    f(lane, at);
  });
}

inline Step load(Form form) {
  return [form](Warp& warp, const Instruction& by, uint32_t active) {
    const int size = form.count * form.bytes;
    at_addresses(warp, by, active, by.operands.back(), size, [&](int lane, uint64_t at) {
      if (form.atomic) see(warp, at, form.acquires);
      const Access access = form.atomic ? Access::ATOMIC : form.constant ? Access::READ_CONSTANT : Access::READ;
      const uint8_t* from = form.space == Space::SHARED ? warp.at_shared(at, size, access, by, lane)
                            : form.space == Space::OWN  ? warp.at_own(at, size, by, lane)
                                                        : warp.at_global(at, size, access, by, lane);
      for (int i = 0; i < form.count; ++i) {
        uint64_t loaded = number_at(from + i * form.bytes, form.bytes);
        const int rest = 64 - 8 * form.bytes;
        if (form.is_signed) loaded = static_cast<uint64_t>(static_cast<int64_t>(loaded << rest) >> rest);
        warp.lanes(by.operands[i])[lane] = loaded;
      }
    });
  };
}

inline Step store(Form form) {
  return [form](Warp& warp, const Instruction& by, uint32_t active) {
    const int size = form.count * form.bytes;
    at_addresses(warp, by, active, by.operands[0], size, [&](int lane, uint64_t at) {
      std::array<uint8_t, 16> made{};
      for (int i = 0; i < form.count; ++i)
        std::memcpy(&made[i * form.bytes], &warp.lanes(by.operands[i + 1])[lane], form.bytes);
      if (form.space == Space::SHARED)
        warp.store_shared(at, made.data(), size, by, lane);
      else
        std::memcpy(form.space == Space::OWN ? warp.at_own(at, size, by, lane)
                                             : warp.at_global(at, size, Access::WRITE, by, lane),
                    made.data(), size);
    });
  };
}

template <class F>
Step atomic(Form form, bool returns, F f) {
  return [=](Warp& warp, const Instruction& by, uint32_t active) {
    at_addresses(warp, by, active, by.operands[returns], 4, [&](int lane, uint64_t at) {
      uint8_t* memory = warp.at_global(at, 4, Access::ATOMIC, by, lane);
      uint32_t before;
      std::memcpy(&before, memory, 4);
      const uint32_t after = f(before, static_cast<uint32_t>(warp.lanes(by.operands[returns + 1])[lane]));
      std::memcpy(memory, &after, 4);
      see(warp, at, form.acquires);
      Clock& released = warp.global->released[at];
      released.resize(warp.clock.size());
      join(released, form.releases ? warp.clock : warp.fenced);
      if (form.releases) ++warp.clock[warp.number];
      if (returns) warp.lanes(by.operands[0])[lane] = before;
    });
  };
}

// What this saw it now knows; what it knows is told by what it writes from now on.
inline void fence(Warp& warp, const Instruction&, uint32_t) {
  join(warp.clock, warp.seen);
  warp.fenced = warp.clock;
  ++warp.clock[warp.number];
}

// cp.async: bytes to shared memory, 0 behind how many there are.
inline void copy_later(Warp& warp, const Instruction& by, uint32_t active) {
  each_lane(active, [&](int lane) {
    auto operand = [&](int i) { return warp.lanes(by.operands[i])[lane]; };
    const uint32_t to = static_cast<uint32_t>(operand(0)), size = operand(2), given = operand(3);
    const uint64_t from = operand(1);
    warp.copies.back().push_back([=, &warp, &by] {
      std::array<uint8_t, 16> bytes{};
      if (given) std::memcpy(bytes.data(), warp.at_global(from, given, Access::READ, by, lane), given);
      std::memcpy(warp.at_shared(to, size, Access::WRITE, by, lane), bytes.data(), size);
    });
  });
}

// Loads and stores have too many names.
inline void add_fence_and_copies(Table& table) {
  table["fence.acq_rel"] = fence;
  table["cp.async"] = copy_later;
  table["cp.async.commit_group"] = close(&Warp::copies);
  table["cp.async.wait_group"] = wait(&Warp::copies);
}

// A load, a store or an atomic operation, of the parts of its name; nothing where it is none that is known.
inline Step step_of_access(const std::vector<std::string>& parts) {
  static const std::vector<std::string> KNOWN{"global", "shared", "shared::cta", "param",   "nc",      "cs",
                                              "cg",     "v2",     "v4",          "acquire", "release", "acq_rel",
                                              "add",    "max",    "inc",         "or",      "relaxed"};
  auto has = [&](const std::string& part) { return std::ranges::find(parts, part) != parts.end(); };
  auto is_known = [&](const std::string& part) { return std::ranges::find(KNOWN, part) != KNOWN.end(); };
  if (parts.size() < 3 || !std::all_of(parts.begin() + 1, parts.end() - 1, is_known)) return {};
  Form form;
  form.space = has("shared") || has("shared::cta") ? Space::SHARED : has("param") ? Space::OWN : Space::GLOBAL;
  form.constant = has("nc");
  form.acquires = has("acquire") || has("acq_rel");
  form.releases = has("release") || has("acq_rel");
  form.atomic = has("relaxed") || form.acquires || form.releases;
  form.is_signed = parts.back().starts_with("s");
  form.count = has("v2") ? 2 : has("v4") ? 4 : 1;
  form.bytes = std::atoi(parts.back().c_str() + 1) / 8;
  const bool known = form.bytes && (form.space != Space::GLOBAL || has("global"));
  if (known && parts[0] == "ld") return load(form);
  if (known && parts[0] == "st" && !form.atomic) return store(form);
  if (known && (parts[0] == "atom" || parts[0] == "red") && form.bytes == 4) {
    const bool returns = parts[0] == "atom";
    if (has("add")) return atomic(form, returns, std::plus<uint32_t>());
    if (has("or")) return atomic(form, returns, std::bit_or<uint32_t>());
    if (has("inc"))
      return atomic(form, returns, [](uint32_t before, uint32_t last) { return before < last ? before + 1 : 0; });
    if (has("max") && form.is_signed)
      return atomic(form, returns,
                    [](uint32_t a, uint32_t b) { return static_cast<uint32_t>(std::max<int32_t>(a, b)); });
  }
  return {};
}
