// The two operations on raw pointers and strides (in elements). `parallel` runs its argument on several threads.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include "kernels.h"

namespace specdec {

// Token ids come as int64 or int32.
struct Ids {
  const void* data = nullptr;
  bool wide = true;

  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Logits {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t request_stride = 0;
  int64_t row_stride = 0;
};

struct VerifyChain {
  int64_t batch, longest, vocab;
  Logits target, draft;  // draft.data null: point masses
  Ids tokens;            // [B, K] by these strides
  int64_t token_strides[2];
  const float* draft_stats;        // [B, K, 3] contiguous, or null
  const int64_t *seed, *position;  // [B]
  Ids num_draft;                   // [B], or null data
  const float* temperatures;       // [B], or null: `temperature`
  float temperature;
  int64_t* out_tokens;    // [B, K + 1]
  int32_t* out_accepted;  // [B]
  bool* out_valid;        // [B]
};

struct Sample {
  int64_t rows, vocab;
  Logits logits;                         // row_stride counts
  const int64_t *seed, *position, *row;  // [R]
  const float* temperatures;             // [R], or null: `temperature`
  float temperature;
  int64_t* out_tokens;  // [R]
  float* out_logprobs;  // [R]
  float* out_stats;     // [R, 3]
};

// Runs body() once on each of up to `threads` threads.
using RunOnThreads = void (*)(int64_t threads, void (*body)(void*), void* context);

// The first draft token that is not in [-1, vocab), as (request, index); checked before anything is written.
std::optional<std::pair<int64_t, int64_t>> find_bad_token(const VerifyChain&);

void verify_chain(const VerifyChain&, int64_t threads, RunOnThreads);
void sample(const Sample&, int64_t threads, RunOnThreads);

}  // namespace specdec
