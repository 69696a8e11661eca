// How kernels are started.
#pragma once

#include "workspace.h"

namespace specdec::cuda {

static_assert(kWarps == kChunkSpans);

template <class Program, class Op>
__global__ void __launch_bounds__(kThreads, kBlocksAProcessor)
    program_kernel(const __grid_constant__ Op op, const __grid_constant__ Workspace work) {
  const Team team;
  Program(team, op, work, part_of(op, blockIdx.x, work.slices)).run();
}

template <class Op>
int start(const Op& op, const Shape& shape, const Scratch& scratch, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.programs)), config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  // Blocks that wait for each other are on the GPU at the same time, or the launch fails.
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative, together.val.cooperative = 1;
  if (by_crews(op) && shape.slices > 1) config.attrs = &together, config.numAttrs = 1;
  return with_program(op, [&](auto type) {
    const auto kernel = program_kernel<typename decltype(type)::type, Op>;
    return int(cudaLaunchKernelEx(&config, kernel, op, workspace_of(shape, scratch)));
  });
}

}  // namespace specdec::cuda
