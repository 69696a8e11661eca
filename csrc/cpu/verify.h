// The operations on raw pointers and strides (in elements). `run` runs its argument on several threads.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include "kernels.h"
#include "source.h"

namespace specdec {

struct Logits {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t request_stride = 0;  // 0 where the rows of a request begin at an offset of its own
  int64_t row_stride = 0;
};

// Temperature and filters: [B, 4] (temperature, top_k, top_p, min_p), or one of each for all.
struct SamplingParameters {
  const float* each = nullptr;
  float temperature = 1.0f;
  int64_t top_k = 0;
  float top_p = 1.0f, min_p = 0.0f;
};

// Mask and edits: see specdec_kernels/ops/processing.py. Null pointers where there are none.
struct Processing {
  const uint32_t* bitmask = nullptr;  // [rows of logits, ceil(V / 32)]
  int64_t edits = 0;                  // M
  const int32_t* ids = nullptr;       // [B, M]
  const int32_t* counts = nullptr;    // [B, M, 2]
  const float* bias = nullptr;        // [B, M]
  const float* penalties = nullptr;   // [B, 3]: repetition, presence, frequency
};

// What verifying a chain and a tree have in common: R rows of target logits a request, as many tokens out at most.
struct Verification {
  int64_t batch, rows, vocab;
  Logits target, draft;  // draft.data null: point masses
  Ids tokens;            // [B, *] by these strides
  int64_t token_strides[2];
  const float* draft_stats;  // [B, draft_rows, 3] contiguous, or null
  int64_t draft_rows;
  const int64_t *seed, *position;  // [B]
  SamplingParameters sampling;
  Processing processing;
  int64_t* out_tokens;                     // [B, R]
  int32_t* out_accepted;                   // [B]
  bool* out_valid;                         // [B]
  float *out_logprobs, *out_raw_logprobs;  // [B, R], or both null
};

// The numbers of rules and children are those of specdec_kernels/contract.py.
enum class Rule { token = 0, block = 1, coupled = 2 };
enum class TreeRule { walk = 0, recursive = 1, traversal = 2, coupled = 3 };
enum class Children { top = 0, iid = 1, without_replacement = 2, race = 3 };

struct VerifyChain {
  Verification common;     // R = K + 1
  const int64_t* cu_rows;  // [B + 1], or null: K + 1 rows each
  Ids num_draft;           // [B], or null data
  Rule rule;
  bool independent;
  int32_t* out_counters;  // [B, 2]: proposed, independent

  int64_t longest() const { return common.rows - 1; }
};

struct VerifyTree {
  Verification common;     // R = N
  const int64_t* parents;  // [B, N] contiguous
  TreeRule rule;
  bool replacement;    // siblings were drawn with it
  int32_t* out_nodes;  // [B, N]
};

struct Sample {
  int64_t rows, vocab;
  Logits logits;                         // row_stride counts
  const int64_t *seed, *position, *row;  // [R]
  SamplingParameters sampling;
  Processing processing;
  bool coupled;
  int64_t* out_tokens;  // [R]
  float* out_logprobs;  // [R]
  float* out_stats;     // [R, 3]
};

struct SampleChildren {
  Sample common;  // tokens and log-probabilities [R, count]
  int64_t count;
  Children how;
};

// Runs body() once on each of up to `threads` threads.
using RunOnThreads = void (*)(int64_t threads, void (*body)(void*), void* context);

// The first draft token that is not in [-1, vocab), as (request, index); checked before anything is written.
std::optional<std::pair<int64_t, int64_t>> find_bad_token(const VerifyChain&);

void verify_chain(const VerifyChain&, int64_t threads, RunOnThreads);
void verify_tree(const VerifyTree&, int64_t threads, RunOnThreads);
void sample(const Sample&, int64_t threads, RunOnThreads);
void sample_children(const SampleChildren&, int64_t threads, RunOnThreads);

}  // namespace specdec
