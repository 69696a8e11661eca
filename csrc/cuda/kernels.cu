// The kernels: a block runs a program.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "programs.h"

namespace specdec::cuda {
namespace {

static_assert(sizeof(Judged) <= kJudgedBytes);

template <Rule kRule, bool P>
__global__ void __launch_bounds__(kThreads, 1) verify_chain_kernel(const VerifyChain op, const Workspace work) {
  const Team team;
  ChainProgram<kRule, P>(team, op, work, blockIdx.x).run();
}

template <bool P>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const Sample op, const Workspace work) {
  const Team team;
  sample_program<P>(team, op, work, blockIdx.x);
}

__global__ void noise_words_kernel(const NoiseWords op) {
  noise_program(op, int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
}

Workspace workspace(const Shape& shape, const Scratch& scratch) {
  return {scratch.tables, static_cast<Judged*>(scratch.judged), scratch.counters, shape.slices, shape.entries};
}

template <Rule kRule>
void launch_rule(const VerifyChain& op, const Shape& shape, const Workspace& work, cudaStream_t stream) {
  const auto kernel =
      processes(op.common.processing) ? verify_chain_kernel<kRule, true> : verify_chain_kernel<kRule, false>;
  kernel<<<unsigned(shape.programs()), kThreads, 0, stream>>>(op, work);
}

}  // namespace

int launch(const VerifyChain& op, const Shape& shape, const Scratch& scratch, void* stream) {
  const Workspace work = workspace(shape, scratch);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (op.rule) {
    case Rule::token: launch_rule<Rule::token>(op, shape, work, on); break;
    case Rule::block: launch_rule<Rule::block>(op, shape, work, on); break;
    case Rule::coupled: launch_rule<Rule::coupled>(op, shape, work, on); break;
  }
  return int(cudaGetLastError());
}

int launch(const Sample& op, const Shape& shape, const Scratch& scratch, void* stream) {
  const auto kernel = processes(op.processing) ? sample_kernel<true> : sample_kernel<false>;
  kernel<<<unsigned(shape.programs()), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op, workspace(shape, scratch));
  return int(cudaGetLastError());
}

int launch(const NoiseWords& op, void* stream) {
  const int64_t blocks = (op.rows * op.counters + kThreads - 1) / kThreads;
  noise_words_kernel<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  return int(cudaGetLastError());
}

}  // namespace specdec::cuda
