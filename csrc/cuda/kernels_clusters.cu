// The kernels for clusters of blocks, which hold the row that they look at: compute capability 9.0 and up.
#define SPECDEC_CLUSTER
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "chain.h"

namespace specdec::cuda {
namespace {

static_assert(sizeof(Judged) <= kPlaceBytes);

template <Rule kRule, bool P>
__global__ void __cluster_dims__(kClusterBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    verify_chain_clusters_kernel(const __grid_constant__ VerifyChain op, const __grid_constant__ Workspace work) {
  const Team team;
  ChainProgram<kRule, P>(team, op, work, blockIdx.x / kClusterBlocks).run_alone();
  team.sync();  // no block leaves while its memory is read
}

template <bool P>
auto kernel_for(Rule rule) {
  return rule == Rule::token ? verify_chain_clusters_kernel<Rule::token, P>
                             : verify_chain_clusters_kernel<Rule::coupled, P>;
}

}  // namespace

int launch_clusters(const VerifyChain& op, const Shape& shape, const Scratch& scratch, void* stream) {
  const auto kernel = processes(op) ? kernel_for<true>(op.rule) : kernel_for<false>(op.rule);
  const auto bytes = int(held_bytes(op));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return int(error);
  const auto blocks = unsigned(shape.programs() * kClusterBlocks);
  kernel<<<blocks, kThreads, size_t(bytes), static_cast<cudaStream_t>(stream)>>>(op, workspace_of(shape, scratch));
  return int(cudaGetLastError());
}

}  // namespace specdec::cuda
