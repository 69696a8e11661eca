// What is launched, and how: the host's half of a program.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../common/elements.h"
#include "../common/ops.h"
#include "../common/trees.h"

namespace specdec::cuda {

// A warp measures a span of a row at a time, a block as many as it has warps. The table of a span has so many floats
// (rows.h).
constexpr int64_t kSpanTiles = 8, kSpanIds = kSpanTiles * kTile, kSpanFloats = 2 * kSpanTiles + 4, kChunkSpans = 8;
// Blocks that a multiprocessor has at a time: 1,024 threads of 64 registers.
constexpr int64_t kBlocksAProcessor = 4;
// Chunks of a row that a block takes at most, one after the other. With more of them fewer blocks have to arrive, but
// only a block that has not started can skip a row that turned out not to be needed.
constexpr int64_t kMostChunks = 8;

// What is known of a row once it was judged (verify.h), and what each cooperating block knows of it (cooperative.h).
constexpr int64_t kJudgedBytes = 80, kStateBytes = 48;

// How an operation works: by rows, of which each block has a slice and waits for no other (verify.h); or the blocks
// that share a request go through its rows together, and wait for each other after each pass (cooperative.h).
inline bool cooperates(const VerifyChain& op) { return op.rule == Rule::block; }
inline bool cooperates(const VerifyTree& op) { return op.rule != TreeRule::walk && op.rule != TreeRule::coupled; }
template <class Op>
bool cooperates(const Op&) {
  return false;
}

// What operations on rows of logits have in common: how many requests, and rows of each; and whether logits are
// processed as they are loaded, or drafts have another dtype, or a vocabulary of their own.
struct Shape {
  int64_t requests, rows, vocab;
  DType dtype;
  bool mixed;
};
inline bool is_processed(const Processing& processing) {
  return processing.bitmask != nullptr || processing.ids != nullptr;
}
inline Shape shape_of(const Verification& all) {
  const bool drafts_differ =
      all.draft.data != nullptr && (all.draft.dtype != all.target.dtype || all.target_to_draft != nullptr);
  return {all.batch, all.rows, all.vocab, all.target.dtype, is_processed(all.processing) || drafts_differ};
}
inline Shape shape_of(const Sample& op) {
  return {op.rows, 1, op.vocab, op.logits.dtype, is_processed(op.processing) || op.target_to_draft != nullptr};
}
template <class Op>
Shape shape_of(const Op& op) {
  return shape_of(op.common);
}

// How an operation is launched, and its scratch. Results do not depend on how it is cut.
struct Plan {
  float* tables = nullptr;  // two of each row, of target and draft
  void *states = nullptr, *judged = nullptr;
  uint32_t* counters = nullptr;  // of each request (verify.h, cooperative.h): who uses them leaves them 0, as they were
  int requests, spans;           // spans of a row
  int slices;                    // blocks that share a row, or a request
  int length;                    // spans of each slice of a row
  bool in_waves;                 // blocks start after others have ended, and may find that they are not needed
  bool ahead;                    // a tree's rows are measured before any is visited
  int64_t blocks;
  int64_t table_bytes, state_bytes, judged_bytes, counter_bytes;

  // The counters lie at the begin of the memory, all else at its end, so that calls of different sizes never write over
  // each other's counters. Callers are told a size that is at least this (specdec_kernels/workspace.py).
  int64_t bytes() const { return counter_bytes + judged_bytes + state_bytes + table_bytes; }
  void set_memory(void* memory, int64_t size) {
    auto* const end = static_cast<unsigned char*>(memory) + size / kWorkspaceAlignment * kWorkspaceAlignment;
    counters = static_cast<uint32_t*>(memory);
    tables = reinterpret_cast<float*>(end - table_bytes);
    states = end - table_bytes - state_bytes;
    judged = end - table_bytes - state_bytes - judged_bytes;
  }
};

// For a GPU with so many multiprocessors.
template <class Op>
Plan plan_of(const Op& op, int64_t processors) {
  const auto [requests, rows_each, vocab, dtype, mixed] = shape_of(op);
  const int64_t rows = requests * rows_each, spans = std::max<int64_t>((vocab + kSpanIds - 1) / kSpanIds, 1);
  const int64_t on_device = std::min(kBlocksAProcessor * processors, kMostBlocks);  // blocks at a time
  int64_t slices, length = spans, blocks, measured = rows;
  bool ahead = true;
  if (cooperates(op)) {
    // All that the GPU has at a time, as long as each has a span of a row and a multiprocessor to itself.
    slices = std::clamp<int64_t>(on_device / std::max<int64_t>(requests, 1), 1, std::min(spans, processors));
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
    if (cooperates(op)) {
      // Rows are each measured when they are visited, in two tables a request; or ahead, all of them: where the rule
      // visits all nodes, or there are so few that they keep no multiprocessor busy.
      ahead = op.rule == TreeRule::traversal ? requests < on_device : rows <= processors;
      measured = ahead ? rows : requests;
    }
  }
  return {.requests = int(requests),
          .spans = int(spans),
          .slices = int(slices),
          .length = int(length),
          .in_waves = !cooperates(op) && blocks > on_device,
          .ahead = ahead,
          .blocks = blocks,
          .table_bytes = aligned(measured * 2 * spans * kSpanFloats * int64_t(sizeof(float))),
          .state_bytes = aligned(cooperates(op) ? rows * slices * kStateBytes : 0),
          .judged_bytes = aligned(rows * kJudgedBytes),
          .counter_bytes = aligned(requests * (rows_each + 2 + words_of(rows_each)) * int64_t(sizeof(uint32_t)))};
}

// Which part of the work a block has: of rows, first rows of all requests first; cooperating, a share of a request.
struct Part {
  int request, row, slice;
};
SPECDEC_SHARED inline Part part_of(const Plan& plan, unsigned index) {
  const unsigned requests = unsigned(plan.requests), slices = unsigned(plan.slices), rest = index / requests;
  return {int(index % requests), int(rest / slices), int(rest % slices)};
}

// Kernels are compiled for each dtype, and once for mixed rows: f(TypeOf<Mixed>()), with what stands for the dtype.
template <class T>
using TypeOf = std::type_identity<T>;
struct Mixed;
template <class F>
auto with_dtype(const Shape& shape, const F& f) {
  if (shape.mixed) return f(TypeOf<Mixed>());
  switch (shape.dtype) {
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
cudaError_t launch(const CompactKv&, const std::vector<char*>& caches, cudaStream_t);

}  // namespace specdec::cuda
