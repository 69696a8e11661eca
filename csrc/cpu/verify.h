// The operations; `run` runs its argument on several threads.
#pragma once

#include <cstdint>

#include "../common/ops.h"
#include "../common/trees.h"

namespace specdec {

// Runs body() once on each of up to `threads` threads.
using RunOnThreads = void (*)(int64_t threads, void (*body)(void*), void* context);

// Whether every draft token is in [-1, vocab): asked before anything is written.
bool ids_in_range(const VerifyChain&);

void verify_chain(const VerifyChain&, int64_t threads, RunOnThreads);
void verify_tree(const VerifyTree&, int64_t threads, RunOnThreads);
void sample(const Sample&, int64_t threads, RunOnThreads);
void sample_children(const SampleChildren&, int64_t threads, RunOnThreads);

// Fills the mask of one request; the last one also clears what nobody uses.
void tree_mask(const TreeMask&, int64_t request);

// One request in one cache.
void compact_kv(const CompactKv&, char* cache, int64_t request);

}  // namespace specdec
