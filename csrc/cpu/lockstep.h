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

  // What is used again by the next call. A piece of a row tells that it is done, and what it found, in one cache line.
  struct Memory {
    struct alignas(64) Piece {
      std::atomic<uint64_t> done;  // which row it was
      Found found;
    };
    struct Turn {
      Piece pieces[kMostPieces];
      TileSpace space;
    };

    uint64_t calls = 0;
    Turn turns[2];
  };

  Lockstep(int64_t pieces, int64_t tiles, Memory& memory)
      : count_(uint32_t(pieces)), call_(++memory.calls << 32), memory_(memory) {
    for (Memory::Turn& turn : memory_.turns) turn.space.resize(tiles);
  }

  // A thread comes, and takes a piece; false if it came too late. Whoever has a piece does it in all rows, so that
  // nobody is waited for who was never there. The last is for the thread that called: it comes in any case, and has
  // other things to do while the one that leads ends the request.
  bool join(Share& share, bool is_caller) {
    ahead = {};
    const uint32_t piece = is_caller ? count_ - 1 : next_piece();
    if (piece == count_) return false;
    share.pieces = uint64_t(1) << piece;
    return true;
  }

  // Two rows take turns: with a piece of each row, nobody is at the next but one before all are done with this.
  TileSpace& space(const Share& share) { return memory_.turns[share.row % 2].space; }

  // `work(piece)` for the thread's pieces of its row, and on to the next row when all pieces of it are done; what all
  // of them found.
  template <class F>
  Found run(Share& share, const F& work) {
    Memory::Piece* const pieces = memory_.turns[share.row % 2].pieces;
    const uint64_t done = call_ + uint64_t(++share.row);  // as no call before it
    const auto finish = [&](uint32_t piece) {
      pieces[piece].found = work(piece);
      pieces[piece].done.store(done, std::memory_order_release);
    };
    for (uint64_t left = share.pieces; left != 0; left &= left - 1) finish(uint32_t(std::countr_zero(left)));
    for (uint32_t piece; share.row == 1 && (piece = next_piece()) != count_;) {
      share.pieces |= uint64_t(1) << piece;
      finish(piece);
    }
    Found all;
    for (uint32_t piece = 0; piece < count_; ++piece) {
      while (pieces[piece].done.load(std::memory_order_acquire) != done) relax();
      all.add(pieces[piece].found);
    }
    return all;
  }

 private:
  // One that nobody has, of all but the last; `count_` if there is none.
  uint32_t next_piece() {
    const uint32_t piece = next_.fetch_add(1, std::memory_order_relaxed);
    return piece + 1 < count_ ? piece : count_;
  }

  alignas(64) std::atomic<uint32_t> next_{0};
  alignas(64) const uint32_t count_;
  const uint64_t call_;
  Memory& memory_;
};

}  // namespace specdec
