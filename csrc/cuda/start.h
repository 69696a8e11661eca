// How kernels are started.
#pragma once

#include "thread_block.h"

namespace specdec::cuda {

#ifdef __CUDACC__
// `together`: the blocks wait for each other, so they are on the GPU at the same time, or the launch fails.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, bool together, cudaStream_t stream,
                          const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative, cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(kThreads), config.stream = stream;
  if (together) config.attrs = &cooperative, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
#endif  // else emulated.cpp has it

template <class Program, class Op>
SPECDEC_KERNEL void program_kernel(SPECDEC_PARAMETER Op op, SPECDEC_PARAMETER Plan plan) {
  Program(op, plan, part_of(plan, unsigned(block_index()))).run();
}

template <class Op>
cudaError_t launch(const Op& op, const Plan& plan, cudaStream_t stream) {
  const bool together = cooperates(op) && plan.slices > 1;
  return with_program(op, [&](auto type) {
    const auto kernel = program_kernel<typename decltype(type)::type, Op>;
    return launch_kernel(kernel, plan.blocks, together, stream, op, plan);
  });
}

}  // namespace specdec::cuda
