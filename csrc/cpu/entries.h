// What the library gives to who calls it without PyTorch's dispatcher (csrc/native/direct.cpp).
#pragma once

#include "../common/ops.h"

namespace specdec {

// A call throws std::runtime_error, before anything is written, for what it refuses.
struct Entries {
  // Of the structs, so that a library is not handed those of another build.
  size_t sizes[2] = {sizeof(VerifyChain), sizeof(Sample)};
  void (*verify_chain)(const VerifyChain&);
  void (*sample)(const Sample&);
};

}  // namespace specdec
