// What is launched, and how: the host's half of a program.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../common/ops.h"
#include "../common/trees.h"

namespace specdec::cuda {

// Ids that a block of threads takes at a time.
constexpr int kThreads = 256, kIdsABlock = 8 * kThreads;
// Teams that a multiprocessor should have to choose from.
constexpr int64_t kTeamsAProcessor = 4;

// A GPU, as far as launches depend on it.
struct Device {
  int64_t processors;
};

// Scratch of a launch; see workspace.h.
struct Scratch {
  float* tables;
  void* places;
  int32_t* counters;
};
// Bytes of a place.
constexpr int64_t kPlaceBytes = 128;

// What an operation needs of it. A chain: two tables a row; of every row the teams that came, of every request the rows
// that were judged and where it is known to stop. A tree: two tables a request, whose one team measures a row when it
// comes to it; or `ahead`, two a row, and of every request the teams that came.
struct Needs {
  int64_t rows;  // that are measured side by side
  int64_t tables, places, counters;
  bool sliced = true;  // several teams may measure a row
  bool ahead = false;
};
inline Needs needs_of(const VerifyChain& op, const Device&) {
  const int64_t rows = op.common.batch * op.common.rows;
  return {rows, 2 * rows, rows, rows + 2 * op.common.batch};
}
inline Needs needs_of(const VerifyTree& op, const Device& device) {
  const int64_t batch = op.common.batch, rows = batch * op.common.rows;
  // Ahead where the rule comes to all nodes, unless requests alone keep the multiprocessors busy; else where there are
  // no more rows than multiprocessors.
  const bool pays =
      op.rule == TreeRule::traversal ? batch < kTeamsAProcessor * device.processors : rows <= device.processors;
  if (pays) return {rows, 2 * rows, rows, batch, true, true};
  return {batch, 2 * batch, rows, 0, false};
}
inline Needs needs_of(const Sample& op, const Device&) { return {op.rows, op.rows, 0, op.rows}; }
inline Needs needs_of(const SampleChildren& op, const Device& device) { return needs_of(op.common, device); }

// How the rows of a launch are cut. The results do not depend on it.
struct Shape {
  int64_t rows;
  int64_t slices;      // of a row, each measured by a team of its own
  int64_t entries;     // of a row's table: its tiles
  bool ahead = false;  // see Needs

  int64_t programs() const { return rows * slices; }
};

// As many slices as it takes to give every multiprocessor four teams to choose from.
template <class Op>
Shape shape_of(const Op& op, int64_t vocab, const Device& device) {
  const Needs needs = needs_of(op, device);
  const int64_t blocks = needs.sliced ? (vocab + kIdsABlock - 1) / kIdsABlock : 1;
  const int64_t wanted = (kTeamsAProcessor * device.processors + needs.rows - 1) / std::max<int64_t>(needs.rows, 1);
  return {needs.rows, std::clamp<int64_t>(wanted, 1, std::max<int64_t>(blocks, 1)), tiles_of(vocab), needs.ahead};
}

// Where scratch lies in memory that was handed in: the counters at its begin, all else at its end, so that calls of
// different sizes never write over each other's counters, which have to be 0. The size that callers are told is at
// least this (verify_chain_workspace in specdec_kernels/ops/workspace.py).
struct Layout {
  static constexpr int64_t kAlign = 256;
  int64_t counters, places, tables;  // bytes

  Layout(const Needs& needs, const Shape& shape)
      : counters(aligned(needs.counters * int64_t(sizeof(int32_t)))),
        places(aligned(needs.places * kPlaceBytes)),
        tables(aligned(needs.tables * 2 * shape.entries * int64_t(sizeof(float)))) {}

  int64_t bytes() const { return counters + places + tables; }
  Scratch in(void* memory, int64_t size) const {
    auto* const begin = static_cast<unsigned char*>(memory);
    auto* const end = begin + size / kAlign * kAlign;
    return {reinterpret_cast<float*>(end - tables), end - tables - places, reinterpret_cast<int32_t*>(begin)};
  }

 private:
  static int64_t aligned(int64_t size) { return (size + kAlign - 1) / kAlign * kAlign; }
};

// What is handed in; only chains can be.
inline std::pair<void*, int64_t> handed(const VerifyChain& op) { return {op.workspace, op.workspace_bytes}; }
template <class Op>
std::pair<void*, int64_t> handed(const Op&) {
  return {nullptr, 0};
}

// Whether logits are changed on the way: kernels that do are compiled apart.
inline bool processes(const Processing& p) { return p.bitmask != nullptr || p.ids != nullptr; }
inline bool processes(const Sample& op) { return processes(op.processing); }
inline bool processes(const Verification& op) { return processes(op.processing); }
template <class Op>
bool processes(const Op& op) {
  return processes(op.common);
}

// `stream` is a cudaStream_t. Returns the error of the launch, a cudaError_t; 0 is none.
int launch(const VerifyChain&, const Shape&, const Scratch&, void* stream);
int launch(const VerifyTree&, const Shape&, const Scratch&, void* stream);
int launch(const Sample&, const Shape&, const Scratch&, void* stream);
int launch(const SampleChildren&, const Shape&, const Scratch&, void* stream);
int launch(const NoiseWords&, void* stream);
int launch(const TreeMask&, void* stream);
// Caches of any number go in several launches; their addresses travel with them.
int launch(const CompactKv&, char* const* caches, int64_t count, void* stream);

}  // namespace specdec::cuda
