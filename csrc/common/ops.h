// What the operations take, on raw pointers and strides (in elements), for every backend in C++.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

// Functions that run on the host and on a GPU alike. Those of no class have internal linkage: every unit compiles them
// for its own instruction set.
#ifdef __CUDACC__
#define SPECDEC_SHARED __host__ __device__
#else
#define SPECDEC_SHARED
#endif

namespace specdec {

// What an operation only reads. On a GPU it lies in global memory, which the compiler cannot tell of every pointer.
template <class T>
SPECDEC_SHARED static inline T given(const T* p) {
#ifdef __CUDA_ARCH__
  return __ldg(p);
#else
  return *p;
#endif
}

enum class DType { f32, bf16, f16 };
SPECDEC_SHARED static inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Where rows that have some ids of the vocabulary only, `width` of them, have each: see Verification::target_to_draft.
// No table: rows have all, in order.
struct Columns {
  const int32_t* table = nullptr;
  int width = 0;
};
// Negative where there is none. The table may be unchecked.
SPECDEC_SHARED static inline int column_of(const Columns& columns, int64_t id) {
  if (columns.table == nullptr) return int(id);
  const int column = given(columns.table + id);
  return column < columns.width ? column : -1;
}

// The two-level race draws a tile of 128 consecutive ids first, then an id inside it (docs/noise.md).
constexpr int64_t kTile = 128;
SPECDEC_SHARED static inline int64_t tiles_of(int64_t vocab) { return (vocab + kTile - 1) / kTile; }

// The words of 32 bits that hold a bit for each of `count`.
template <class T>
SPECDEC_SHARED static inline T words_of(T count) {
  return (count + 31) / 32;
}

constexpr uint32_t kDraft = 0, kAccept = 1, kTarget = 2, kCoupled = 3;  // purposes
constexpr uint32_t kTileRace = 0, kTokenRace = 1;                       // levels

// Rows of one step: the row has 16 bits of the Philox counter.
constexpr int64_t kMaxRows = 1 << 16;

// Everything of a Philox counter but the index: docs/noise.md.
struct Noise {
  uint64_t seed;
  uint64_t position;
  uint32_t tag;  // purpose | level << 8 | row << 16
};

// Temperature 0, or too small for float32 scalars, is greedy: scale = inf marks a point mass.
constexpr float kMinTemperature = 1e-5f;
SPECDEC_SHARED static inline float scale_of(float temperature) {
  return temperature < kMinTemperature ? INFINITY : 1.0f / temperature;
}

// Whether a row is steep (docs/noise.md): from 2^31 on no other float32 is so near to the largest logit that it would
// have any weight, and the two floats of a logsumexp could not hold what the weights are relative to.
constexpr float kSteep = 0x1p31f;
SPECDEC_SHARED static inline bool is_steep(float scale, float largest) {
  return largest * scale >= kSteep || largest * scale <= -kSteep;
}

// A sum of what is left is one minus what was taken where that is at least this; below, it would have no digits left.
constexpr double kLeastDifference = 0.25;

// A share of a distribution below this counts as nothing when siblings are drawn and verified.
constexpr double kNothingLeft = 0x1p-60;

// Token ids come as int64 or int32.
struct Ids {
  const void* data = nullptr;
  bool wide = true;

  SPECDEC_SHARED int64_t operator[](int64_t i) const {
    return wide ? given(static_cast<const int64_t*>(data) + i) : given(static_cast<const int32_t*>(data) + i);
  }
};

// The ids of a request that bias or penalties may touch, ascending, the size of the vocabulary behind the last; see
// specdec_kernels/ops/processing.py.
struct Adjustments {
  int64_t count = 0;
  const int32_t* ids = nullptr;     // [count]
  const int32_t* counts = nullptr;  // [count, 2]: in the prompt, in the output
  const float* bias = nullptr;      // [count]
  float repetition = 1.0f, presence = 0.0f, frequency = 0.0f;
};

// The first adjustment whose id is not below `id`.
SPECDEC_SHARED static inline int64_t first_adjustment(const Adjustments& adjustments, int64_t id) {
  int64_t low = 0, high = adjustments.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (given(adjustments.ids + middle) < id)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// A logit after bias and penalties, its id `drafted` times among the drafts before it.
SPECDEC_SHARED static inline float adjusted(const Adjustments& adjustments, int64_t adjustment, int64_t drafted,
                                            float x) {
  const int64_t output = given(adjustments.counts + 2 * adjustment + 1) + drafted;
  x += given(adjustments.bias + adjustment);
  if (output > 0 || given(adjustments.counts + 2 * adjustment) > 0)
    x = x > 0.0f ? x / adjustments.repetition : x * adjustments.repetition;
  if (output > 0) x -= adjustments.frequency * float(output) + adjustments.presence;
  return x;
}

struct Logits {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t request_stride = 0;  // 0 where the rows of a request begin at an offset of its own
  int64_t row_stride = 0;
  int64_t width = 0;  // of a row
};

SPECDEC_SHARED static inline const void* address(const Logits& logits, int64_t elements) {
  return static_cast<const char*>(logits.data) + elements * bytes_of(logits.dtype);
}

// Temperature and filters: [B, 4] (temperature, top_k, top_p, min_p), or one of each for all.
struct SamplingParameters {
  const float* each = nullptr;
  float temperature = 1.0f;
  int64_t top_k = 0;
  float top_p = 1.0f, min_p = 0.0f;

  SPECDEC_SHARED SamplingParameters of(int64_t request) const {
    if (each == nullptr) return *this;
    const float* own = each + 4 * request;
    return {nullptr, own[0], int64_t(own[1]), own[2], own[3]};
  }
};

// Mask and adjustments: see specdec_kernels/ops/processing.py. Null pointers where there are none.
struct Processing {
  const uint32_t* bitmask = nullptr;  // [rows of logits, ceil(V / 32)]
  int64_t adjustments = 0;            // M
  const int32_t* ids = nullptr;       // [B, M]
  const int32_t* counts = nullptr;    // [B, M, 2]
  const float* bias = nullptr;        // [B, M]
  const float* penalties = nullptr;   // [B, 3]: repetition, presence, frequency
};

SPECDEC_SHARED static inline Adjustments adjustments_of(const Processing& all, int64_t request) {
  if (all.ids == nullptr) return {};
  const int64_t first = request * all.adjustments;
  const float* own = all.penalties + 3 * request;
  return {all.adjustments, all.ids + first, all.counts + 2 * first, all.bias + first, own[0], own[1], own[2]};
}

SPECDEC_SHARED static inline const uint32_t* mask_of(const Processing& all, int64_t vocab, int64_t row) {
  return all.bitmask ? all.bitmask + row * words_of(vocab) : nullptr;
}

// What verifying a chain and a tree have in common: R rows of target logits a request, as many tokens out at most.
struct Verification {
  int64_t batch, rows, vocab;
  Logits target, draft;  // draft.data null: point masses
  Ids tokens;            // [B, *] by these strides
  int64_t token_strides[2];
  const float* draft_stats;  // [B, draft_rows, 3] contiguous, or null
  // [vocab]: the column of a draft row that has the logit of a target id, -1 where none has: it is -inf. Null: its own.
  const int32_t* target_to_draft = nullptr;
  int64_t draft_rows;
  const float* draft_temperatures = nullptr;  // [B], or null: one for all; not looked at where there are stats
  float draft_temperature = 1.0f;
  const int64_t *seed, *position;  // [B]
  SamplingParameters sampling;
  Processing processing;
  int64_t* out_tokens;                     // [B, R]
  int32_t* out_accepted;                   // [B]
  bool* out_valid;                         // [B]
  float *out_logprobs, *out_raw_logprobs;  // [B, R], or both null

  SPECDEC_SHARED int64_t token(int64_t request, int64_t i) const {
    return tokens[request * token_strides[0] + i * token_strides[1]];
  }
  SPECDEC_SHARED float draft_scale(int64_t request) const {
    return scale_of(draft_temperatures ? draft_temperatures[request] : draft_temperature);
  }
};

// The numbers of rules and children are those of specdec_kernels/contract.py.
enum class Rule { token = 0, block = 1, coupled = 2 };
enum class TreeRule { walk = 0, recursive = 1, traversal = 2, coupled = 3 };
enum class Children { top = 0, iid = 1, without_replacement = 2, race = 3 };

// What verify_chain_workspace (specdec_kernels/workspace.py) asks for: enough for any backend. Blocks that share
// requests, if not one each, are this many at most.
constexpr int64_t kWorkspaceAlignment = 256, kMostBlocks = 1024;
inline int64_t aligned(int64_t size) {
  return (size + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}
inline int64_t workspace_bytes(int64_t batch, int64_t rows, int64_t vocab) {
  const int64_t all = batch * rows, tiles = tiles_of(vocab), spans = (tiles + 7) / 8;
  const int64_t counters = all + (2 + words_of(rows)) * batch;
  const auto of_triton = 5 * int64_t(std::bit_ceil(uint64_t(std::max(tiles, int64_t(16)))));
  const int64_t numbers = std::max(of_triton, 40 * spans);
  const int64_t blocks = std::min(batch * spans, std::max(batch, kMostBlocks));
  return aligned(counters * 4) + aligned(all * 128) + aligned(blocks * rows * 48) + aligned(all * numbers * 4);
}

struct VerifyChain {
  Verification common;     // R = K + 1
  const int64_t* cu_rows;  // [B + 1], or null: K + 1 rows each
  Ids num_draft;           // [B], or null data
  Rule rule;
  bool independent;
  int32_t* out_counters;      // [B, 2]: proposed, independent
  void* workspace = nullptr;  // handed in, or null; what a CPU needs it has
  int64_t workspace_bytes = 0;

  SPECDEC_SHARED int64_t longest() const { return common.rows - 1; }

  // Drafts of a request at most.
  SPECDEC_SHARED int64_t num_drafts(int64_t request) const {
    int64_t limit = longest();
    if (cu_rows != nullptr && cu_rows[request + 1] - cu_rows[request] - 1 < limit)
      limit = cu_rows[request + 1] - cu_rows[request] - 1;
    if (num_draft.data != nullptr && num_draft[request] < limit)
      limit = num_draft[request] > 0 ? num_draft[request] : 0;
    return limit;
  }
};

// Nodes before the first one without a parent among the earlier.
SPECDEC_SHARED static inline int64_t live_nodes(const int64_t* parents, int64_t nodes) {
  if (nodes == 0 || parents[0] != -1) return 0;
  int64_t live = 1;
  while (live < nodes && parents[live] >= 0 && parents[live] < live) ++live;
  return live;
}

struct VerifyTree {
  Verification common;     // R = N
  const int64_t* parents;  // [B, N] contiguous
  TreeRule rule;
  bool replacement;    // siblings were drawn with it
  int32_t* out_nodes;  // [B, N]
};

struct Sample {
  int64_t rows, vocab;
  Logits logits;                             // row_stride counts
  const int32_t* target_to_draft = nullptr;  // [vocab], as of Verification: what is drawn are ids of the target
  const int64_t *seed, *position, *row;      // [R]
  SamplingParameters sampling;
  Processing processing;
  bool coupled;
  int64_t* out_tokens;  // [R]
  float* out_logprobs;  // [R]
  float* out_stats;     // [R, 3]
};

struct NoiseWords {
  int64_t rows, first, counters;
  uint32_t tag;
  const int64_t *seed, *position;  // [R]
  int64_t* out;                    // [R, 4 * counters]
};

struct SampleChildren {
  Sample common;  // tokens and log-probabilities [R, count]
  int64_t count;
  Children method;
};

}  // namespace specdec
