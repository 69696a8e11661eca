// The kernels of `verify_tree`.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "trees.h"
#include "start.h"

namespace specdec::cuda {
namespace {

static_assert(sizeof(Visited) <= kPlaceBytes && sizeof(Node) <= kPlaceBytes);

template <class T, bool kIsCoupled>
SPECDEC_KERNEL walk_tree_kernel(const __grid_constant__ VerifyTree op, const __grid_constant__ Workspace work) {
  const Team team;
  WalkProgram<T, kIsCoupled>(team, op, work, part_of(op, blockIdx.x, work.slices)).run();
}

template <class T>
SPECDEC_KERNEL descend_tree_kernel(const __grid_constant__ VerifyTree op, const __grid_constant__ Workspace work) {
  const Team team;
  DescendProgram<T>(team, op, work, part_of(op, blockIdx.x, work.slices)).run();
}

}  // namespace

int launch(const VerifyTree& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return with_dtype(op, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = op.rule == TreeRule::walk      ? walk_tree_kernel<T, false>
                        : op.rule == TreeRule::coupled ? walk_tree_kernel<T, true>
                                                       : descend_tree_kernel<T>;
    return start(kernel, op, shape, scratch, stream);
  });
}

}  // namespace specdec::cuda
