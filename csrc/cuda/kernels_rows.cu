// The kernels of `sample`, `sample_children` and `noise_words`.
#include "sample.h"
#include "start.h"

namespace specdec::cuda {
namespace {

SPECDEC_KERNEL void noise_words_kernel(SPECDEC_PARAMETER NoiseWords op) {
  noise_program(op, block_index() * kThreads + block::rank());
}

}  // namespace

template cudaError_t launch(const Sample&, const Plan&, cudaStream_t);
template cudaError_t launch(const SampleChildren&, const Plan&, cudaStream_t);

cudaError_t launch(const NoiseWords& op, cudaStream_t stream) {
  const int64_t blocks = (op.rows * op.counters + kThreads - 1) / kThreads;
  return launch_kernel(noise_words_kernel, blocks, false, stream, op);
}

}  // namespace specdec::cuda
