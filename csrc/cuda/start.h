// How kernels are started.
#pragma once

#include "workspace.h"

#define SPECDEC_KERNEL __global__ void __launch_bounds__(kThreads, kBlocksAProcessor)

namespace specdec::cuda {

static_assert(kWarps == kChunkSpans);

template <class Op>
int start(void (*kernel)(Op, Workspace), const Op& op, const Shape& shape, const Scratch& scratch, void* stream) {
  const Workspace work = workspace_of(shape, scratch);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.programs)), config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  // Blocks that wait for each other are on the GPU at the same time, or the launch fails.
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative, together.val.cooperative = 1;
  if (by_crews(op) && shape.slices > 1) config.attrs = &together, config.numAttrs = 1;
  return int(cudaLaunchKernelEx(&config, kernel, op, work));
}

}  // namespace specdec::cuda
