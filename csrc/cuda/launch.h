// What is launched, and how: the host's half of a program.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../common/elements.h"
#include "../common/ops.h"
#include "../common/trees.h"

namespace specdec::cuda {

// A warp measures a span of a row at a time, a block as many as it has warps. The table of a span has so many floats
// (rows.h).
constexpr int64_t kSpanTiles = 8, kSpanIds = kSpanTiles * kTile, kSpanFloats = 2 * kSpanTiles + 4, kChunkSpans = 8;
// Blocks that a multiprocessor has at a time: 1,024 threads of 64 registers.
constexpr int64_t kBlocksAProcessor = 4;
// Spans of a row that a block takes at most, one chunk after the other: it arrives once for all of them, but rows that
// are not needed are found out by blocks that have not started.
constexpr int64_t kMostChunks = 8;

// A GPU, as far as launches depend on it.
struct Device {
  int64_t processors;

  int64_t blocks() const { return kBlocksAProcessor * processors; }
};

// Scratch of a launch; see workspace.h.
struct Scratch {
  float* tables;
  void* places;
  int32_t* counters;
};
// Bytes of a place.
constexpr int64_t kPlaceBytes = 128;

// How an operation works. By rows: each block has a slice of a row, and nobody waits for anybody (request.h). By crews:
// the blocks that share a request go through its rows together, and wait for each other after each pass (crew.h).
inline bool by_crews(const VerifyChain& op) { return op.rule == Rule::block; }
inline bool by_crews(const VerifyTree& op) { return op.rule == TreeRule::recursive || op.rule == TreeRule::traversal; }
template <class Op>
bool by_crews(const Op&) {
  return false;
}

// What every operation on rows of logits says of them.
template <class Op>
SPECDEC_SHARED const auto& common_of(const Op& op) {
  if constexpr (requires { op.common; })
    return op.common;
  else
    return op;
}
SPECDEC_SHARED inline int64_t requests_of(const Verification& all) { return all.batch; }
SPECDEC_SHARED inline int64_t requests_of(const Sample& all) { return all.rows; }
inline const Logits& logits_of(const Verification& all) { return all.target; }
inline const Logits& logits_of(const Sample& all) { return all.logits; }
inline bool drafts_differ(const Verification& all) {
  return all.draft.data != nullptr && (all.draft.dtype != all.target.dtype || all.target_to_draft != nullptr);
}
inline bool drafts_differ(const Sample& op) { return op.target_to_draft != nullptr; }

// Blocks that share a request: all that the GPU has at a time, as long as each has a span of a row and a multiprocessor
// to itself.
template <class Op>
int64_t crew_of(const Op& op, const Device& device) {
  const int64_t most =
      std::max<int64_t>(std::min((common_of(op).vocab + kSpanIds - 1) / kSpanIds, device.processors), 1);
  return std::clamp<int64_t>(device.blocks() / std::max<int64_t>(requests_of(common_of(op)), 1), 1, most);
}

// What an operation needs of scratch: of each row two tables, of target and draft; of each request counters (request.h,
// crew.h). A tree's rows are each measured when a crew comes to it, in two tables a request, or `ahead`, all of them:
// where the rule comes to all nodes, or there are so few that they keep no multiprocessor busy.
struct Needs {
  int64_t rows;
  int64_t tables, places, counters;
  bool ahead = true;
};
inline int64_t counters_of_request(int64_t rows) { return rows + 2 + (rows + 31) / 32; }
inline Needs needs_of(const VerifyChain& op, const Device&) {
  const int64_t rows = op.common.batch * op.common.rows;
  return {rows, 2 * rows, rows, op.common.batch * counters_of_request(op.common.rows)};
}
inline Needs needs_of(const VerifyTree& op, const Device& device) {
  const int64_t batch = op.common.batch, rows = batch * op.common.rows;
  const int64_t counters = batch * counters_of_request(op.common.rows);
  if (!by_crews(op)) return {rows, 2 * rows, rows, counters};
  const bool ahead = op.rule == TreeRule::traversal ? batch < device.blocks() : rows <= device.processors;
  return {rows, 2 * (ahead ? rows : batch), rows * crew_of(op, device), counters, ahead};
}
inline Needs needs_of(const Sample& op, const Device&) { return {op.rows, op.rows, 0, op.rows}; }
inline Needs needs_of(const SampleChildren& op, const Device& device) { return needs_of(op.common, device); }

// How a launch is cut. The results do not depend on it.
struct Shape {
  int64_t programs;  // blocks
  int64_t slices;    // blocks that share a row, or a request
  int64_t length;    // spans of each slice of a row
  int64_t entries;   // half the floats of a row's table
  bool in_waves;     // blocks start after others have ended
  bool ahead;        // see Needs

  int64_t spans() const { return 2 * entries / kSpanFloats; }
};

template <class Op>
Shape shape_of(const Op& op, const Device& device) {
  const Needs needs = needs_of(op, device);
  const int64_t spans = (common_of(op).vocab + kSpanIds - 1) / kSpanIds, entries = spans * kSpanFloats / 2;
  if (by_crews(op)) {
    const int64_t crew = crew_of(op, device);
    return {requests_of(common_of(op)) * crew, crew, spans, entries, false, needs.ahead};
  }
  // Some waves of blocks, so that few wait for the last ones.
  constexpr int64_t kWaves = 2;
  const int64_t chunks = std::max<int64_t>((spans + kChunkSpans - 1) / kChunkSpans, 1);
  const int64_t each = std::clamp<int64_t>(needs.rows * chunks / (kWaves * device.blocks()), 1, kMostChunks);
  const int64_t slices = (chunks + each - 1) / each, length = (chunks + slices - 1) / slices * kChunkSpans;
  const int64_t programs = needs.rows * slices;
  return {programs, slices, length, entries, programs > device.blocks(), needs.ahead};
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

// Kernels are compiled for each dtype, and once for rows whose logits are processed as they are loaded, whose drafts
// have another dtype, or a vocabulary of their own: f(Mixed), with what stands for it.
template <class T>
struct TypeOf {
  using type = T;
};
struct Mixed;
template <class Op, class F>
auto with_dtype(const Op& op, const F& f) {
  const auto& all = common_of(op);
  const Processing& processing = all.processing;
  if (processing.bitmask != nullptr || processing.ids != nullptr || drafts_differ(all)) return f(TypeOf<Mixed>());
  switch (logits_of(all).dtype) {
    case DType::bf16: return f(TypeOf<BFloat16>());
    case DType::f16: return f(TypeOf<Half>());
    default: return f(TypeOf<float>());
  }
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
