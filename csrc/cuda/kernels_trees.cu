// The kernels of `verify_tree`.
#include "trees.h"
#include "start.h"

namespace specdec::cuda {

int launch(const VerifyTree& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return start(op, shape, scratch, stream);
}

}  // namespace specdec::cuda
