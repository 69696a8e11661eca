// What a library of operators gives to who calls it without PyTorch's dispatcher (csrc/native/fast_path.cpp).
#pragma once

#include "ops.h"

namespace specdec {

// A call throws std::runtime_error, before anything is written, for what it refuses. `device` is the index of where the
// tensors are.
struct Entries {
  // Of the structs, so that a library is not handed those of another build.
  size_t sizes[4] = {sizeof(VerifyChain), sizeof(VerifyTree), sizeof(Sample), sizeof(SampleChildren)};
  void (*verify_chain)(const VerifyChain&, int32_t device);
  void (*verify_tree)(const VerifyTree&, int32_t device);
  void (*sample)(const Sample&, int32_t device);
  void (*sample_children)(const SampleChildren&, int32_t device);
};

// Those of a library whose operators run as run(op, device).
template <auto run>
const Entries* entries_of() {
  static const Entries entries{
      .verify_chain = [](const VerifyChain& op, int32_t device) { run(op, device); },
      .verify_tree = [](const VerifyTree& op, int32_t device) { run(op, device); },
      .sample = [](const Sample& op, int32_t device) { run(op, device); },
      .sample_children = [](const SampleChildren& op, int32_t device) { run(op, device); },
  };
  return &entries;
}

}  // namespace specdec
