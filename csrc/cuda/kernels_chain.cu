// The kernels of `verify_chain`.
#include "cooperative.h"
#include "start.h"

template cudaError_t specdec::cuda::launch(const VerifyChain&, const Plan&, cudaStream_t);
