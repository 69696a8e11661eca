// The kernels of `verify_chain`.
#include "crew.h"
#include "start.h"

namespace specdec::cuda {

template cudaError_t launch(const VerifyChain&, const Plan&, cudaStream_t);

}  // namespace specdec::cuda
