// The kernels of `verify_chain`.
#include "crew.h"
#include "start.h"

namespace specdec::cuda {

int launch(const VerifyChain& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return start(op, shape, scratch, stream);
}

}  // namespace specdec::cuda
