// Registers the CUDA kernels with PyTorch. Loads with a torch without CUDA too: what only the other one has is weak.
#define USE_CUDA 1
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "../common/entries.h"
#include "../common/operators.h"
#include "../common/tree_operators.h"
#include "launch.h"

#ifndef SPECDEC_LIBRARY  // else see emulated.cpp
#define SPECDEC_LIBRARY specdec
#define SPECDEC_KEY CUDA
#define SPECDEC_DEVICE_TYPE aoti_torch_device_type_cuda
#endif

#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak aoti_torch_create_cuda_guard
#pragma weak aoti_torch_delete_cuda_guard

namespace specdec::cuda {
namespace {

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

// While it lives a device is the current one; PyTorch's, which does not start a GPU by going back to it.
auto on_device(int32_t device) {
  CUDAGuardHandle guard = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard));
  return std::unique_ptr<CUDAGuardOpaque, decltype(&aoti_torch_delete_cuda_guard)>(guard, aoti_torch_delete_cuda_guard);
}

cudaStream_t stream_of(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Of the first GPUs that the kernels are compiled for; checked here, since an import must not start CUDA.
constexpr int kLeastCapability = 8;

// Nothing of a device changes, so each is asked once.
std::map<int32_t, int> processors_of_devices;
int processors_of(int32_t device) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  int major = 0, &processors = processors_of_devices[device];
  if (processors > 0) return processors;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_TORCH_CHECK(major >= kLeastCapability, "backend='cuda' needs a GPU of compute capability ", kLeastCapability,
                  ".0, GPU ", device, " has ", major, ".x: try backend='triton'");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return processors;
}

Tensor make_memory(int64_t size, int32_t device) {
  constexpr int64_t kStride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &kStride, aoti_torch_dtype_uint8(), SPECDEC_DEVICE_TYPE(), device, &handle));
  return Tensor(handle);
}

// Counters that are 0, and who uses them leaves them so, which saves a launch. Calls on one stream follow each other
// and share them; a graph may be replayed beside anything, so each call of it has its own, in its scratch. Those of a
// stream are no tensor: torch.compile calls what it will capture once before, and no tensor that is made there may
// outlive it.
void* zeroed_counters(void* own, int64_t bytes, int32_t device, cudaStream_t stream) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capturing));
  const auto in_scratch = [&] { return check(cudaMemsetAsync(own, 0, size_t(bytes), stream)), own; };
  if (capturing != cudaStreamCaptureStatusNone) return in_scratch();
  static std::mutex mutex;
  static std::map<std::pair<int32_t, cudaStream_t>, std::pair<void*, int64_t>> cached;
  const std::lock_guard lock(mutex);
  auto& [counters, size] = cached[{device, stream}];
  if (size < bytes) {  // those that are too few stay: another thread may be about to launch with them
    auto mode = cudaStreamCaptureModeRelaxed;  // or it would end what another thread captures
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    void* more = nullptr;
    const cudaError_t error = cudaMalloc(&more, size_t(2 * bytes));
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    if (error == cudaErrorMemoryAllocation) return cudaGetLastError(), in_scratch();  // PyTorch may hold all there is
    check(error);
    check(cudaMemsetAsync(more, 0, size_t(2 * bytes), stream));
    counters = more, size = 2 * bytes;
  }
  return counters;
}

template <class Op>
void run(const Op& op, int32_t index) {
  Plan plan = plan_of(op, processors_of(index));
  if (plan.blocks == 0) return;
  const auto on = on_device(index);
  const cudaStream_t stream = stream_of(index);
  Tensor scratch;
  void* memory = nullptr;
  int64_t bytes = plan.bytes();
  if constexpr (requires { op.workspace; })
    if (op.workspace != nullptr) memory = op.workspace, bytes = op.workspace_bytes;
  const bool handed_in = memory != nullptr;
  if (!handed_in) scratch = make_memory(bytes, index), memory = scratch.mutable_data_ptr();
  STD_TORCH_CHECK(bytes >= plan.bytes(), "workspace must have at least ", plan.bytes(), " bytes, got ", bytes);
  plan.set_memory(memory, bytes);
  if (!handed_in) plan.counters = static_cast<uint32_t*>(zeroed_counters(memory, plan.counter_bytes, index, stream));
  check(launch(op, plan, stream));
}

// What needs no scratch.
template <class Op, class... More>
void run_alone(int32_t index, const Op& op, const More&... more) {
  const auto on = on_device(index);
  check(launch(op, more..., stream_of(index)));
}
void run(const NoiseWords& op, int32_t index) { run_alone(index, op); }
void run(const TreeMask& op, const Tensor& like) { run_alone(like.get_device_index(), op); }
void run(const CompactKv& op, const std::vector<char*>& caches, const Tensor& like) {
  run_alone(like.get_device_index(), op, caches);
}

STABLE_TORCH_LIBRARY_IMPL(SPECDEC_LIBRARY, SPECDEC_KEY, m) {
  implement<[](const auto& op, const Tensor& like) { run(op, like.get_device_index()); }>(m);
  implement_trees<[](const auto&... arguments) { run(arguments...); }>(m);
}

}  // namespace
}  // namespace specdec::cuda

// For who calls without the dispatcher; and the CUDA whose drivers run this.
extern "C" {
__attribute__((visibility("default"))) const specdec::Entries* specdec_entries() {
  return specdec::entries_of<[](const auto& op, int32_t device) { specdec::cuda::run(op, device); }>();
}
__attribute__((visibility("default"))) int specdec_cuda_version() { return CUDART_VERSION; }
}
