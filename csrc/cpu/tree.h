// Attention masks of trees of drafts, and moving keys and values of accepted nodes into place.
#pragma once

#include "../common/trees.h"

namespace specdec {

// Fills the mask of one request; the last one also clears what nobody uses.
void tree_mask(const TreeMask&, int64_t request);

// One request in one cache.
void compact_kv(const CompactKv&, char* cache, int64_t request);

}  // namespace specdec
