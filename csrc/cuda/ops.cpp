// Registers the CUDA kernels with PyTorch. Built and loaded with a torch without CUDA: what only the other one
// has is declared weak.
#define USE_CUDA 1
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <map>
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

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace specdec::cuda {
namespace {

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

// Makes a device the current one for a while.
class OnDevice {
 public:
  explicit OnDevice(int32_t device) : device_(device) {
    check(cudaGetDevice(&before_));
    if (before_ != device_) check(cudaSetDevice(device_));
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int device_, before_ = 0;
};

// Of the first GPUs that the kernels are compiled for. That is checked here and not at import, which must not start
// CUDA.
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
  if (capturing != cudaStreamCaptureStatusNone) return check(cudaMemsetAsync(own, 0, size_t(bytes), stream)), own;
  static std::mutex mutex;
  static std::map<std::pair<int32_t, cudaStream_t>, std::pair<void*, int64_t>> cached;
  const std::lock_guard lock(mutex);
  auto& [counters, size] = cached[{device, stream}];
  if (size < bytes) {  // those that are too few stay: another thread may be about to launch with them
    check(cudaMalloc(&own, size_t(2 * bytes)));
    check(cudaMemsetAsync(own, 0, size_t(2 * bytes), stream));
    counters = own, size = 2 * bytes;
  }
  return counters;
}

template <class Op>
void run(const Op& op, int32_t index) {
  Plan plan = plan_of(op, processors_of(index));
  if (plan.blocks == 0) return;
  const OnDevice on(index);
  const cudaStream_t stream = on.stream();
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
  const OnDevice on(index);
  check(launch(op, more..., on.stream()));
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
