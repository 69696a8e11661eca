// The operations; `run` runs its argument on several threads.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include "../common/ops.h"

namespace specdec {

// Runs body() once on each of up to `threads` threads.
using RunOnThreads = void (*)(int64_t threads, void (*body)(void*), void* context);

// The first draft token that is not in [-1, vocab), as (request, index); checked before anything is written.
std::optional<std::pair<int64_t, int64_t>> find_bad_token(const VerifyChain&);

void verify_chain(const VerifyChain&, int64_t threads, RunOnThreads);
void verify_tree(const VerifyTree&, int64_t threads, RunOnThreads);
void sample(const Sample&, int64_t threads, RunOnThreads);
void sample_children(const SampleChildren&, int64_t threads, RunOnThreads);

}  // namespace specdec
