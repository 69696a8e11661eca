// What is launched, and how: the host's half of a program.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
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

// What is known of a row takes so many bytes at most.
constexpr int64_t kPlaceBytes = 128;

// How an operation works. By rows: each block has a slice of a row, and no block waits for another (verify.h). By
// crews: the blocks that share a request go through its rows together, and wait for each other after each pass
// (crew.h).
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
inline int64_t rows_of_request(const Verification& all) { return all.rows; }
inline int64_t rows_of_request(const Sample&) { return 1; }
inline const Logits& logits_of(const Verification& all) { return all.target; }
inline const Logits& logits_of(const Sample& all) { return all.logits; }
inline bool drafts_differ(const Verification& all) {
  return all.draft.data != nullptr && (all.draft.dtype != all.target.dtype || all.target_to_draft != nullptr);
}
inline bool drafts_differ(const Sample& op) { return op.target_to_draft != nullptr; }

// How an operation is launched, and its scratch. Results do not depend on how it is cut.
struct Plan {
  float* tables = nullptr;       // two of each row, of target and draft
  void* places = nullptr;        // what is known of each row, as the program has it
  uint32_t* counters = nullptr;  // of each request (verify.h, crew.h): who uses them leaves them 0, as they were
  int spans;                     // of a row
  int slices;                    // blocks that share a row, or a request
  int length;                    // spans of each slice of a row
  bool in_waves;                 // blocks start after others have ended, and may find that they are not needed
  bool ahead;                    // a tree's rows are measured before any is visited
  int64_t blocks;
  int64_t table_bytes, place_bytes, counter_bytes;

  // The counters lie at the begin of the memory, all else at its end, so that calls of different sizes never write over
  // each other's counters. Callers are told a size that is at least this (specdec_kernels/workspace.py).
  int64_t bytes() const { return counter_bytes + place_bytes + table_bytes; }
  void set_memory(void* memory, int64_t size) {
    auto* const end = static_cast<unsigned char*>(memory) + size / kWorkspaceAlignment * kWorkspaceAlignment;
    counters = static_cast<uint32_t*>(memory);
    places = end - table_bytes - place_bytes;
    tables = reinterpret_cast<float*>(end - table_bytes);
  }
};

// For a GPU with so many multiprocessors, and a request at least.
template <class Op>
Plan plan_of(const Op& op, int64_t processors) {
  const auto& all = common_of(op);
  const int64_t requests = requests_of(all), rows_each = rows_of_request(all), rows = requests * rows_each;
  const int64_t spans = std::max<int64_t>((all.vocab + kSpanIds - 1) / kSpanIds, 1);
  const int64_t on_device = kBlocksAProcessor * processors;  // blocks at a time
  int64_t slices, length = spans, blocks, places = rows, measured = rows;
  bool ahead = true;
  if (by_crews(op)) {
    // All that the GPU has at a time, as long as each has a span of a row and a multiprocessor to itself.
    slices = std::clamp<int64_t>(on_device / requests, 1, std::min(spans, processors));
    blocks = requests * slices;
  } else {
    // Some waves of blocks, so that few wait for the last ones.
    constexpr int64_t kWaves = 2;
    const int64_t chunks = (spans + kChunkSpans - 1) / kChunkSpans;
    const int64_t chunks_each = std::clamp<int64_t>(rows * chunks / (kWaves * on_device), 1, kMostChunks);
    slices = (chunks + chunks_each - 1) / chunks_each;
    length = (chunks + slices - 1) / slices * kChunkSpans;
    blocks = rows * slices;
  }
  if constexpr (std::is_same_v<Op, VerifyTree>) {
    if (by_crews(op)) {
      // Rows are each measured when a crew visits them, in two tables a request; or ahead, all of them: where the rule
      // visits all nodes, or there are so few that they keep no multiprocessor busy.
      ahead = op.rule == TreeRule::traversal ? requests < on_device : rows <= processors;
      measured = ahead ? rows : requests;
      places = rows * slices;
    }
  }
  const auto aligned = [](int64_t size) {
    return (size + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  };
  return {.spans = int(spans),
          .slices = int(slices),
          .length = int(length),
          .in_waves = !by_crews(op) && blocks > on_device,
          .ahead = ahead,
          .blocks = blocks,
          .table_bytes = aligned(measured * 2 * spans * kSpanFloats * int64_t(sizeof(float))),
          .place_bytes = aligned(places * kPlaceBytes),
          .counter_bytes = aligned(requests * (rows_each + 2 + (rows_each + 31) / 32) * int64_t(sizeof(uint32_t)))};
}

// Scratch that the caller passed, of a chain.
template <class Op>
std::pair<void*, int64_t> passed_workspace(const Op& op) {
  if constexpr (requires { op.workspace; })
    return {op.workspace, op.workspace_bytes};
  else
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

template <class Op>
cudaError_t launch(const Op&, const Plan&, cudaStream_t);
cudaError_t launch(const NoiseWords&, cudaStream_t);
cudaError_t launch(const TreeMask&, cudaStream_t);
// Caches of any number go in several launches; their addresses travel with them.
cudaError_t launch(const CompactKv&, char* const* caches, int64_t count, cudaStream_t);

}  // namespace specdec::cuda
