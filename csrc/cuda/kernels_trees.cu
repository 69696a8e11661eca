// The kernels of `verify_tree`.
#include "trees.h"
#include "start.h"

namespace specdec::cuda {

template cudaError_t launch(const VerifyTree&, const Plan&, cudaStream_t);

}  // namespace specdec::cuda
