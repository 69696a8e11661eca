// Teams on a CPU, for tests: of one thread, which is quick; or of SPECDEC_EMULATED_THREADS real threads that wait for
// each other where those of a block do, so that a thread sanitizer can tell where one is missing to wait.
#pragma once

#include <vector>
#ifdef SPECDEC_EMULATED_THREADS
#include <array>
#include <barrier>
#include <memory>
#endif

namespace specdec::cuda {

#ifdef SPECDEC_EMULATED_THREADS

constexpr int kElements = 8;
constexpr int kGroup = kTile / kElements;
constexpr int kWarp = 32;

// What the threads of a team share.
class Block {
 public:
  explicit Block(int size) : size_(size), slots_(size_t(size)), all_(size) {
    for (int group = 0; group < size / kGroup; ++group) groups_.push_back(std::make_unique<std::barrier<>>(kGroup));
  }

 private:
  friend class Team;
  struct Slot {
    alignas(16) std::array<unsigned char, 16> bytes;
  };
  const int size_;
  std::vector<Slot> slots_;
  std::barrier<> all_;
  std::vector<std::unique_ptr<std::barrier<>>> groups_;
};

class Team {
 public:
  Team(Block& block, int rank) : block_(block), rank_(rank) {}
  int rank() const { return rank_; }
  int size() const { return block_.size_; }
  void sync() const { block_.all_.arrive_and_wait(); }

  template <class T, class F>
  T in_group(T x, const F& combine) const {
    std::barrier<>& group = *block_.groups_[size_t(rank_ / kGroup)];
    put(x);
    group.arrive_and_wait();
    x = shuffled<kGroup>(rank_ / kGroup * kGroup, combine, T{})[size_t(rank_ % kGroup)];
    group.arrive_and_wait();  // all have read what the next call overwrites
    return x;
  }

  bool any_in_warp(bool x) const { return x; }  // here groups go their own ways; a group's threads agree

  template <class T, class F>
  T reduce(T x, const F& combine) const {
    put(x);
    sync();
    x = shuffled<kWarp>(0, combine, T{})[0];
    for (int warp = 1; warp < size() / kWarp; ++warp) x = combine(x, shuffled<kWarp>(warp * kWarp, combine, T{})[0]);
    sync();
    return x;
  }

  bool last_to_arrive(int32_t* counter, int32_t others) const {
    sync();
    int32_t before = 0;
    if (rank_ == 0) before = (*counter)++;
    return reduce(before, Larger()) == others;
  }

  void raise(int32_t* value, int32_t least) const {
    if (rank_ == 0) *value = *value < least ? least : *value;
  }

 private:
  template <class T>
  void put(const T& x) const {
    static_assert(sizeof(T) <= 16);
    std::memcpy(&block_.slots_[size_t(rank_)].bytes, &x, sizeof(T));
  }

  // What kWidth threads from `first` hold after they combined what they put, each with its opposite: as on a GPU.
  template <int kWidth, class F, class T>
  std::array<T, kWidth> shuffled(int first, const F& combine, T) const {
    std::array<T, kWidth> held;
    for (int lane = 0; lane < kWidth; ++lane)
      std::memcpy(static_cast<void*>(&held[size_t(lane)]), &block_.slots_[size_t(first) + size_t(lane)].bytes,
                  sizeof(T));
    for (int mask = kWidth / 2; mask > 0; mask /= 2) {
      const std::array<T, kWidth> before = held;
      for (int lane = 0; lane < kWidth; ++lane)
        held[size_t(lane)] = combine(before[size_t(lane)], before[size_t(lane ^ mask)]);
    }
    return held;
  }

  Block& block_;
  const int rank_;
};

#else

constexpr int kElements = kTile;
constexpr int kGroup = 1;

class Block {
 public:
  explicit Block(int) {}
};

class Team {
 public:
  Team(Block&, int) {}
  int rank() const { return 0; }
  int size() const { return 1; }
  void sync() const {}
  template <class T, class F>
  T in_group(T x, const F&) const {
    return x;
  }
  bool any_in_warp(bool x) const { return x; }
  template <class T, class F>
  T reduce(T x, const F&) const {
    return x;
  }
  bool last_to_arrive(int32_t* counter, int32_t others) const { return (*counter)++ == others; }
  void raise(int32_t* value, int32_t least) const { *value = *value < least ? least : *value; }
};

#endif

template <class T>
T fresh(const T* place) {
  return *place;
}

}  // namespace specdec::cuda
