// Attention masks of trees of drafts, on raw pointers; see specdec_kernels/ops/trees.py.
#pragma once

#include <cstdint>

#include "../common/ops.h"

namespace specdec {

// The numbers are those of specdec_kernels/contract.py.
enum class MaskFormat { packed = 0, dense = 1, flat = 2, flat_bits = 3 };

// What one element of the mask is written as.
enum class MaskElement { byte, word16, word32, bool8, f32, bf16, f16 };

struct TreeMask {
  int64_t batch, nodes;
  int64_t room;                 // elements of `out` a request: as many as it may need
  const int64_t* parents;       // [B, N]
  const int64_t* context_lens;  // [B], or null
  MaskFormat format;
  MaskElement element;
  void* out;
};

// Fills the mask of one request; the last one also clears what nobody uses.
void tree_mask(const TreeMask&, int64_t request);

}  // namespace specdec
