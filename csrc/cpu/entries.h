// What the library gives to who calls it without PyTorch's dispatcher (csrc/native/direct.cpp).
#pragma once

#include "../common/ops.h"

namespace specdec {

// A call throws std::runtime_error, before anything is written, for what it refuses.
struct Entries {
  // Of the structs, so that a library is not handed those of another build.
  size_t sizes[4] = {sizeof(VerifyChain), sizeof(VerifyTree), sizeof(Sample), sizeof(SampleChildren)};
  void (*verify_chain)(const VerifyChain&);
  void (*verify_tree)(const VerifyTree&);
  void (*sample)(const Sample&);
  void (*sample_children)(const SampleChildren&);
};

}  // namespace specdec
