// The kernels of `verify_tree`.
#include "cooperative.h"
#include "start.h"

template cudaError_t specdec::cuda::launch(const VerifyTree&, const Plan&, cudaStream_t);
