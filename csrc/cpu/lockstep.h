// Threads that go through one request side by side, each deciding for itself what comes next: all see the same sums, so
// nobody has to be told. Between two rows they look at each other's cache lines once; a thread that hands out the work
// (team.h) and one that takes it look at six, one after the other. Across an L3 cache's border that was a third of a
// row.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>

#include "team.h"
#include "tile_space.h"

namespace specdec {

class Lockstep {
 public:
  static constexpr int64_t kMostPieces = 64;

  // What one thread does: its pieces of every row, as bits, and the row it is at.
  struct Share {
    uint64_t pieces = 0;
    int64_t row = 0;

    bool leads() const { return pieces & 1; }
  };

  // What is used again by the next call.
  struct Memory {
    struct alignas(64) Piece {
      std::atomic<int64_t> rows;  // done
      Found found[2];             // in the last two
    };

    Piece pieces[kMostPieces];
    TileSpace spaces[2];
  };

  Lockstep(int64_t pieces, int64_t tiles, Memory& memory) : count_(uint32_t(pieces)), memory_(memory) {
    for (uint32_t piece = 0; piece < count_; ++piece) memory_.pieces[piece].rows.store(0, std::memory_order_relaxed);
    for (TileSpace& space : memory_.spaces) space.resize(tiles);
  }

  // A thread comes, and takes a piece; false if it came too late. Whoever has a piece does it in all rows, so that
  // nobody is waited for who was never there.
  bool join(Share& share) {
    ahead = {};
    const uint32_t piece = next_.fetch_add(1, std::memory_order_relaxed);
    if (piece >= count_) return false;
    share.pieces = uint64_t(1) << piece;
    return true;
  }

  // Two rows take turns: with a piece of each row, nobody is at the next but one before all are done with this.
  TileSpace& space(const Share& share) { return memory_.spaces[share.row % 2]; }

  // `work(piece)` for the thread's pieces of its row, and on to the next row when all pieces of it are done; what all
  // of them found.
  template <class F>
  Found run(Share& share, const F& work) {
    const int64_t turn = share.row % 2, done = ++share.row;
    const auto finish = [&](uint32_t piece) {
      memory_.pieces[piece].found[turn] = work(piece);
      memory_.pieces[piece].rows.store(done, std::memory_order_release);
    };
    for (uint64_t left = share.pieces; left != 0; left &= left - 1) finish(uint32_t(std::countr_zero(left)));
    for (uint32_t piece; done == 1 && (piece = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      share.pieces |= uint64_t(1) << piece;
      finish(piece);
    }
    Found all;
    for (uint32_t piece = 0; piece < count_; ++piece) {
      while (memory_.pieces[piece].rows.load(std::memory_order_acquire) < done) relax();
      const Found& one = memory_.pieces[piece].found[turn];
      all.shared = all.shared && one.shared;
      if (!std::isnan(one.logit)) all.logit = one.logit;
    }
    return all;
  }

 private:
  alignas(64) std::atomic<uint32_t> next_{0};
  alignas(64) const uint32_t count_;
  Memory& memory_;
};

}  // namespace specdec
