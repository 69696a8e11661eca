// The kernels of `sample`, `sample_children` and `noise_words`.
#include "sample.h"
#include "start.h"

namespace specdec::cuda {
namespace {

__global__ void noise_words_kernel(const NoiseWords op) {
  noise_program(op, int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
}

}  // namespace

int launch(const Sample& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return start(op, shape, scratch, stream);
}

int launch(const SampleChildren& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return start(op, shape, scratch, stream);
}

int launch(const NoiseWords& op, void* stream) {
  const int64_t blocks = (op.rows * op.counters + kThreads - 1) / kThreads;
  noise_words_kernel<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  return int(cudaGetLastError());
}

}  // namespace specdec::cuda
