// What calls of the CUDA backend take the host, and tests of it, where there is no GPU: ops.cpp as it is, with a
// stand-in for the CUDA runtime, and launches that let the CPU's operators compute, or nothing.
#define SPECDEC_NAMESPACE specdec_emulated
#define SPECDEC_DEVICE CPU
#define SPECDEC_DEVICE_TYPE aoti_torch_device_type_cpu
#include "ops.cpp"

#include "../cpu/verify.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = specdec::cuda::stand_in::stream;
  return 0;
}

namespace specdec::cuda {
namespace {

void serially(int64_t, void (*body)(void*), void* context) { body(context); }

// Whoever uses the counters leaves them 0; and all else may hold anything. Fails where that is not so.
template <class Op>
int launched(const Op& op, const Shape& shape, const Scratch& scratch,
             void (*compute)(const Op&, int64_t, RunOnThreads)) {
  ++stand_in::launched;
  if (stand_in::idle) return cudaSuccess;
  const Needs needs = needs_of(op, Device{132});
  if (std::any_of(scratch.counters, scratch.counters + needs.counters, [](int32_t x) { return x != 0; }))
    return cudaErrorInvalidValue;
  std::memset(scratch.tables, 0xFF, size_t(needs.tables * 2 * shape.entries) * sizeof(float));
  std::memset(scratch.places, 0xFF, size_t(needs.places * kPlaceBytes));
  compute(op, 1, serially);
  return cudaSuccess;
}

}  // namespace

int launch(const VerifyChain& op, const Shape& shape, const Scratch& scratch, void*) {
  return launched(op, shape, scratch, verify_chain);
}
int launch(const VerifyTree& op, const Shape& shape, const Scratch& scratch, void*) {
  return launched(op, shape, scratch, verify_tree);
}
int launch(const Sample& op, const Shape& shape, const Scratch& scratch, void*) {
  return launched(op, shape, scratch, sample);
}
int launch(const SampleChildren& op, const Shape& shape, const Scratch& scratch, void*) {
  return launched(op, shape, scratch, sample_children);
}
int launch(const NoiseWords&, void*) { return cudaErrorInvalidValue; }
int launch(const TreeMask& op, void*) {
  for (int64_t b = 0; b < op.batch; ++b) tree_mask(op, b);
  return cudaSuccess;
}
int launch(const CompactKv& op, char* const* caches, int64_t count, void*) {
  for (int64_t i = 0; i < count * op.batch; ++i) compact_kv(op, caches[i / op.batch], i % op.batch);
  return cudaSuccess;
}

}  // namespace specdec::cuda

// For tests and benchmarks, through ctypes.
extern "C" {
__attribute__((visibility("default"))) void specdec_stand_in(void* stream, bool capturing, bool idle) {
  specdec::cuda::stand_in::stream = stream;
  specdec::cuda::stand_in::capturing = capturing;
  specdec::cuda::stand_in::idle = idle;
}
// How often since the last time: a device was asked what it is, memory was cleared, something was launched.
__attribute__((visibility("default"))) void specdec_stand_in_counts(int* counts) {
  using namespace specdec::cuda::stand_in;
  counts[0] = asked, counts[1] = cleared, counts[2] = launched;
  asked = cleared = launched = 0;
}
}
