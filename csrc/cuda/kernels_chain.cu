// The kernels of `verify_chain`.
#include "crew.h"
#include "start.h"

template cudaError_t specdec::cuda::launch(const VerifyChain&, const Plan&, cudaStream_t);
