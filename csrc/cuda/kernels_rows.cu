// The kernels of `sample`, `sample_children` and `noise_words`.
#include "sample.h"
#include "start.h"

namespace specdec::cuda {
namespace {

SPECDEC_KERNEL void noise_words_kernel(SPECDEC_PARAMETER NoiseWords op) {
  const int64_t index = block_index() * kThreads + block::rank(), r = index / op.counters;
  if (r >= op.rows) return;
  const uint32_t counter = uint32_t(op.first + index % op.counters);
  const Words words = philox({uint64_t(op.seed[r]), uint64_t(op.position[r]), op.tag}, counter);
  for (int word = 0; word < 4; ++word) op.out[4 * index + word] = int64_t(words.w[word]);
}

}  // namespace

template cudaError_t launch(const Sample&, const Plan&, cudaStream_t);
template cudaError_t launch(const SampleChildren&, const Plan&, cudaStream_t);

cudaError_t launch(const NoiseWords& op, cudaStream_t stream) {
  const int64_t blocks = (op.rows * op.counters + kThreads - 1) / kThreads;
  return launch_kernel(noise_words_kernel, blocks, false, stream, op);
}

}  // namespace specdec::cuda
