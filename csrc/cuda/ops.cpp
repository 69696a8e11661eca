// Registers the CUDA kernels with PyTorch. Built and loaded with a torch that knows no CUDA: what only the other one
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

#ifndef SPECDEC_NAMESPACE  // else see stand_in.cpp
#define SPECDEC_NAMESPACE specdec
#define SPECDEC_DEVICE CUDA
#define SPECDEC_DEVICE_TYPE aoti_torch_device_type_cuda
#endif

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace specdec::cuda {
namespace {

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Of the first GPUs that the kernels are compiled for. It is looked at here and not at import, which must not start
// CUDA.
constexpr int kLeastCapability = 8;

// Nothing of a device changes, so each is asked once.
Device describe(int32_t device) {
  static std::mutex mutex;
  static std::map<int32_t, Device> known;
  const std::lock_guard lock(mutex);
  const auto [entry, added] = known.try_emplace(device);
  if (added) {
    int major = 0, processors = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    STD_TORCH_CHECK(major >= kLeastCapability, "backend='cuda' needs a GPU of compute capability ", kLeastCapability,
                    ".0, GPU ", device, " has ", major, ".x: try backend='triton'");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    entry->second.processors = processors;
  }
  return entry->second;
}

// Memory of a launch that nobody reads after it. The counters are 0, and who uses them leaves them so, which saves a
// launch.
struct Buffers {
  Tensor counters, memory;

  static Tensor bytes(int64_t size, int32_t device) {
    const int64_t stride = 1;
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), SPECDEC_DEVICE_TYPE(), device, &handle));
    return Tensor(handle);
  }
  static Tensor zeros(int64_t size, int32_t device, cudaStream_t stream) {
    Tensor made = bytes(size, device);
    check(cudaMemsetAsync(made.mutable_data_ptr(), 0, size_t(size), stream));
    return made;
  }
};

// Calls on one stream follow each other and share what they need; a graph may be replayed beside anything, so each call
// of it has its own.
Buffers buffers(int64_t counters, int64_t memory, int32_t device, cudaStream_t stream) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capturing));
  if (capturing != cudaStreamCaptureStatusNone)
    return {Buffers::zeros(counters, device, stream), Buffers::bytes(memory, device)};
  static std::mutex mutex;
  static auto& cached = *new std::map<std::pair<int32_t, cudaStream_t>, Buffers>;  // outlives the driver's own exit
  const std::lock_guard lock(mutex);
  const auto [entry, added] = cached.try_emplace({device, stream});
  Buffers& own = entry->second;
  if (added || own.counters.size(0) < counters) own.counters = Buffers::zeros(2 * counters, device, stream);
  if (added || own.memory.size(0) < memory) own.memory = Buffers::bytes(memory, device);
  return own;
}

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

 private:
  int device_, before_ = 0;
};

template <class Op>
void run(const Op& op, int32_t index) {
  const OnDevice guard(index);
  const Device device = describe(index);
  const Needs needs = needs_of(op, device);
  if (needs.rows == 0) return;
  const cudaStream_t stream = current_stream(index);
  const Shape shape = shape_of(op, device);
  const Layout layout(needs, shape);
  if (const auto [memory, bytes] = handed(op); memory != nullptr) {
    STD_TORCH_CHECK(bytes >= layout.bytes(), "workspace must have at least ", layout.bytes(), " bytes, got ", bytes);
    return check(cudaError_t(launch(op, shape, layout.in(memory, bytes), stream)));
  }
  const Buffers own = buffers(layout.counters, layout.places + layout.tables, index, stream);
  auto* const places = out<unsigned char>(own.memory);
  const Scratch scratch{reinterpret_cast<float*>(places + layout.places), places, out<int32_t>(own.counters)};
  check(cudaError_t(launch(op, shape, scratch, stream)));
}

void run(const NoiseWords& op, int32_t device) {
  if (op.rows * op.counters == 0) return;
  const OnDevice guard(device);
  check(cudaError_t(launch(op, current_stream(device))));
}

void run(const TreeMask& op, const Tensor& like) {
  const OnDevice guard(like.get_device_index());
  check(cudaError_t(launch(op, current_stream(like.get_device_index()))));
}

void run(const CompactKv& op, const std::vector<char*>& caches, const Tensor& like) {
  const OnDevice guard(like.get_device_index());
  check(cudaError_t(launch(op, caches.data(), int64_t(caches.size()), current_stream(like.get_device_index()))));
}

STABLE_TORCH_LIBRARY_IMPL(SPECDEC_NAMESPACE, SPECDEC_DEVICE, m) {
  implement<[](const auto& op, const Tensor& like) { run(op, like.get_device_index()); }>(m);
  implement_trees<[](const auto&... arguments) { run(arguments...); }>(m);
}

}  // namespace
}  // namespace specdec::cuda

// For who calls without the dispatcher.
extern "C" __attribute__((visibility("default"))) const specdec::Entries* specdec_entries() {
  return specdec::entries_of<[](const auto& op, int32_t device) { specdec::cuda::run(op, device); }>();
}
