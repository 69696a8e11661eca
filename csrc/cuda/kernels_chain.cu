// The kernels of `verify_chain`.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "chain.h"
#include "start.h"

namespace specdec::cuda {
namespace {

static_assert(sizeof(Judged) <= kPlaceBytes);

template <class T, Rule kRule>
SPECDEC_KERNEL verify_chain_kernel(const __grid_constant__ VerifyChain op, const __grid_constant__ Workspace work) {
  const Team team;
  ChainProgram<T, kRule>(team, op, work, part_of(op, blockIdx.x, work.slices)).run();
}

}  // namespace

int launch(const VerifyChain& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return with_dtype(op, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = op.rule == Rule::token   ? verify_chain_kernel<T, Rule::token>
                        : op.rule == Rule::block ? verify_chain_kernel<T, Rule::block>
                                                 : verify_chain_kernel<T, Rule::coupled>;
    return start(kernel, op, shape, scratch, stream);
  });
}

}  // namespace specdec::cuda
