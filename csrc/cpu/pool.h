// What the operators run on: an instruction set and PyTorch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>

#include "kernels.h"

namespace specdec {

inline const Kernels& require_kernels() {
  const Kernels* table = kernels();
  STD_TORCH_CHECK(table != nullptr, "SPECDEC_CPU_ISA must be scalar, avx2 or avx512 and run on this machine, got ",
                  std::getenv("SPECDEC_CPU_ISA"));
  return *table;
}

inline void on_threads(int64_t threads, void (*body)(void*), void* context) {
  // A range that the pool cuts into fewer pieces than threads is fine: a ThreadGroup does not count on its members.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(context); });
}

}  // namespace specdec
