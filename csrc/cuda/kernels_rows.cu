// The kernels of `sample`, `sample_children` and `noise_words`.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sample.h"
#include "start.h"

namespace specdec::cuda {
namespace {

template <class T, bool kIsCoupled>
SPECDEC_KERNEL sample_kernel(const __grid_constant__ Sample op, const __grid_constant__ Workspace work) {
  const Team team;
  RowProgram<T>(team, op, work, part_of(op, blockIdx.x, work.slices)).template sample<kIsCoupled>();
}

SPECDEC_KERNEL sample_children_kernel(const __grid_constant__ SampleChildren op,
                                      const __grid_constant__ Workspace work) {
  const Team team;
  RowProgram<Mixed>(team, op.common, work, part_of(op, blockIdx.x, work.slices)).sample_children(int(op.count), op.how);
}

__global__ void noise_words_kernel(const NoiseWords op) {
  noise_program(op, int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
}

}  // namespace

int launch(const Sample& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return with_dtype(op, [&](auto type) {
    using T = typename decltype(type)::type;
    return start(op.coupled ? sample_kernel<T, true> : sample_kernel<T, false>, op, shape, scratch, stream);
  });
}

int launch(const SampleChildren& op, const Shape& shape, const Scratch& scratch, void* stream) {
  return start(sample_children_kernel, op, shape, scratch, stream);
}

int launch(const NoiseWords& op, void* stream) {
  const int64_t blocks = (op.rows * op.counters + kThreads - 1) / kThreads;
  noise_words_kernel<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  return int(cudaGetLastError());
}

}  // namespace specdec::cuda
