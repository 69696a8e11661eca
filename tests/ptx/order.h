// What orders accesses, by vector clocks of warps (Flanagan and Freund, FastTrack, 2009): two of them may not touch a
// byte, one to write it, with nothing between them that makes what the first did known to the second. Between lanes of
// a warp that is what they do together, which its own clock counts.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

using Clock = std::vector<uint32_t>;  // by warp

struct Epoch {
  uint32_t warp : 12 = 0, clock : 20 = 0;               // clocks begin with 1
  uint32_t line : 22 = 0, lane : 6 = 0, bytes : 4 = 0;  // which of a word
};
constexpr uint32_t SEVERAL = 32;  // lanes of a warp

enum class Access : uint8_t { READ, READ_CONSTANT, WRITE, ATOMIC };  // constant: nothing of the launch may write it

// What was done to four bytes since they were last written.
struct Word {
  Epoch written, read;
  int readers = -1, atomics = -1;  // lists of several who are not ordered
};

class Order {
 public:
  void touch(uint64_t address, size_t bytes, Access access, const Clock& clock, Epoch now) {
    for (uint64_t end = address + bytes, next; address < end; address = next) {
      next = std::min(end, address / 4 * 4 + 4);
      now.bytes = ((1u << (next - address)) - 1) << address % 4;
      touch(word(address / 4), access, clock, now);
    }
  }

 private:
  static constexpr int PAGE = 1024;

  Word& word(uint64_t number) {
    if (number / PAGE != last_) {
      auto& page = pages_[last_ = number / PAGE];
      if (!page) page = std::make_unique<std::array<Word, PAGE>>();
      current_ = page.get();
    }
    return (*current_)[number % PAGE];
  }

  void touch(Word& at, Access access, const Clock& clock, Epoch now) {
    after(at.written, clock, now);
    if (access == Access::READ_CONSTANT && at.written.clock && at.written.bytes & now.bytes)
      fail("line " + std::to_string(now.line) + " reads as constant what line " + std::to_string(at.written.line) +
           " wrote");
    const bool reads = access == Access::READ || access == Access::READ_CONSTANT;
    if (!reads) {
      after(at.read, clock, now);
      after_all(at.readers, clock, now);
    }
    if (access != Access::ATOMIC) after_all(at.atomics, clock, now);
    if (access == Access::WRITE) {
      at = {now, {}, -1, -1};
    } else if (access == Access::ATOMIC) {
      add(at.atomics, now);
    } else if (at.read.warp == now.warp ? replaces(now, at.read) : clock[at.read.warp] >= at.read.clock) {
      at.read = both(at.read, now);
    } else {
      add(at.readers, now);
    }
  }

  // Of one warp: whether nothing is lost where the later one stands for both.
  static bool replaces(Epoch now, Epoch before) { return now.clock != before.clock || now.bytes == before.bytes; }
  static Epoch both(Epoch before, Epoch now) {
    if (before.warp == now.warp && before.clock == now.clock && before.lane != now.lane) now.lane = SEVERAL;
    return now;
  }

  static void after(Epoch before, const Clock& clock, Epoch now) {
    const bool unordered = before.warp != now.warp ? clock[before.warp] < before.clock
                                                   : before.clock == now.clock && before.lane != now.lane;
    if (unordered && (before.bytes & now.bytes))
      fail("line " + std::to_string(now.line) + " races with line " + std::to_string(before.line));
  }

  void after_all(int list, const Clock& clock, Epoch now) const {
    if (list >= 0)
      for (Epoch each : lists_[list]) after(each, clock, now);
  }

  void add(int& list, Epoch now) {
    if (list < 0) {
      list = static_cast<int>(lists_.size());
      lists_.emplace_back();
    }
    auto& epochs = lists_[list];
    auto own = std::find_if(epochs.rbegin(), epochs.rend(),
                            [&](Epoch each) { return each.warp == now.warp && replaces(now, each); });
    own == epochs.rend() ? epochs.push_back(now) : void(*own = both(*own, now));
  }

  std::unordered_map<uint64_t, std::unique_ptr<std::array<Word, PAGE>>> pages_;
  std::array<Word, PAGE>* current_ = nullptr;
  uint64_t last_ = ~0ull;
  std::vector<std::vector<Epoch>> lists_;
};

inline void join(Clock& clock, const Clock& other) {
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}
