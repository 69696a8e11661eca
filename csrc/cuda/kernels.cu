// The kernels: a block runs a program.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "chain.h"
#include "launch.h"
#include "sample.h"
#include "trees.h"

namespace specdec::cuda {
namespace {

static_assert(sizeof(Judged) <= kPlaceBytes && sizeof(Node) <= kPlaceBytes);

template <Rule kRule, bool P>
__global__ void __launch_bounds__(kThreads, 1)
    verify_chain_kernel(const __grid_constant__ VerifyChain op, const __grid_constant__ Workspace work) {
  const Team team;
  ChainProgram<kRule, P>(team, op, work, blockIdx.x).run();
}

template <bool P>
__global__ void __launch_bounds__(kThreads, 1)
    verify_tree_kernel(const __grid_constant__ VerifyTree op, const __grid_constant__ Workspace work) {
  const Team team;
  TreeProgram<P>(team, op, work, blockIdx.x).run();
}

template <bool P>
__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(const __grid_constant__ Sample op, const __grid_constant__ Workspace work) {
  const Team team;
  RowProgram<P>(team, op, work, blockIdx.x).sample();
}

template <bool P>
__global__ void __launch_bounds__(kThreads, 1)
    sample_children_kernel(const __grid_constant__ SampleChildren op, const __grid_constant__ Workspace work) {
  const Team team;
  RowProgram<P>(team, op.common, work, blockIdx.x).sample_children(op.count, op.how);
}

__global__ void noise_words_kernel(const NoiseWords op) {
  noise_program(op, int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
}

template <class Op>
int start(void (*kernel)(Op, Workspace), const Op& op, const Shape& shape, const Scratch& scratch, void* stream) {
  const Workspace work = workspace_of(shape, scratch);
  kernel<<<unsigned(shape.programs()), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op, work);
  return int(cudaGetLastError());
}

template <bool P>
auto chain_kernel(Rule rule) {
  switch (rule) {
    case Rule::token: return verify_chain_kernel<Rule::token, P>;
    case Rule::block: return verify_chain_kernel<Rule::block, P>;
    default: return verify_chain_kernel<Rule::coupled, P>;
  }
}

}  // namespace

int launch(const VerifyChain& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return start(processes(op) ? chain_kernel<true>(op.rule) : chain_kernel<false>(op.rule), op, shape, scratch, stream);
}

int launch(const VerifyTree& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return start(processes(op) ? verify_tree_kernel<true> : verify_tree_kernel<false>, op, shape, scratch, stream);
}

int launch(const Sample& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return start(processes(op) ? sample_kernel<true> : sample_kernel<false>, op, shape, scratch, stream);
}

int launch(const SampleChildren& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return start(processes(op) ? sample_children_kernel<true> : sample_children_kernel<false>, op, shape, scratch,
               stream);
}

int launch(const NoiseWords& op, void* stream) {
  const int64_t blocks = (op.rows * op.counters + kThreads - 1) / kThreads;
  noise_words_kernel<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  return int(cudaGetLastError());
}

}  // namespace specdec::cuda
