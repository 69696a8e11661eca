// Registers the CUDA kernels with PyTorch. Built and loaded with a torch that knows no CUDA: what only the other one
// has is declared weak.
#define USE_CUDA 1
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <mutex>
#include <utility>

#include "../common/operators.h"
#include "../common/tree_operators.h"
#include "launch.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace specdec::cuda {
namespace {

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Device describe(int32_t device) {
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return {processors};
}

// int32 counters that are 0; who uses them leaves them so, which saves a launch. Calls on one stream follow each other
// and share them; a graph may be replayed beside anything, so each has its own.
Tensor counters_at_rest(const Tensor& like, int64_t count, cudaStream_t stream) {
  static std::mutex mutex;
  static auto& kept = *new std::map<std::pair<int32_t, cudaStream_t>, Tensor>;  // outlives the driver's own exit
  const auto fresh = [&](int64_t size) {
    Tensor made = make(like, {size}, aoti_torch_dtype_int32());
    check(cudaMemsetAsync(made.mutable_data_ptr(), 0, size_t(4 * size), stream));
    return made;
  };
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capturing));
  if (capturing != cudaStreamCaptureStatusNone) return fresh(count);
  const std::lock_guard lock(mutex);
  const std::pair key{like.get_device_index(), stream};
  const auto found = kept.find(key);
  if (found != kept.end() && found->second.size(0) >= count) return found->second;
  Tensor made = fresh(2 * count);
  kept.insert_or_assign(key, made);
  return made;
}

// Makes the device of a tensor the current one for a while.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& like) : device_(like.get_device_index()) {
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
void run(const Op& op, const Tensor& like) {
  const OnDevice guard(like);
  const Device device = describe(like.get_device_index());
  const Needs needs = needs_of(op, device);
  if (needs.rows == 0) return;
  const cudaStream_t stream = current_stream(like.get_device_index());
  const int64_t vocab = like.size(like.dim() - 1);
  const Shape shape = shape_of(op, vocab, device);
  if (const auto [memory, bytes] = handed(op); memory != nullptr) {
    const Layout layout(needs, shape);
    STD_TORCH_CHECK(bytes >= layout.bytes(), "workspace must have at least ", layout.bytes(), " bytes, got ", bytes);
    return check(cudaError_t(launch(op, shape, layout.in(memory, bytes), stream)));
  }
  const Tensor tables = make(like, {needs.tables, 2 * shape.entries}, aoti_torch_dtype_float32());
  const Tensor places = make(like, {needs.places, kPlaceBytes}, aoti_torch_dtype_uint8());
  const Tensor counters = counters_at_rest(like, needs.counters, stream);
  const Scratch scratch{out<float>(tables), out<uint8_t>(places), out<int32_t>(counters)};
  check(cudaError_t(launch(op, shape, scratch, stream)));
}

void run(const NoiseWords& op, const Tensor& like) {
  if (op.rows * op.counters == 0) return;
  const OnDevice guard(like);
  check(cudaError_t(launch(op, current_stream(like.get_device_index()))));
}

void run(const TreeMask& op, const Tensor& like) {
  const OnDevice guard(like);
  check(cudaError_t(launch(op, current_stream(like.get_device_index()))));
}

void run(const CompactKv& op, const std::vector<char*>& caches, const Tensor& like) {
  const OnDevice guard(like);
  check(cudaError_t(launch(op, caches.data(), int64_t(caches.size()), current_stream(like.get_device_index()))));
}

STABLE_TORCH_LIBRARY_IMPL(specdec, CUDA, m) {
  implement<[](const auto& op, const Tensor& like) { run(op, like); }>(m);
  implement_trees<[](const auto&... arguments) { run(arguments...); }>(m);
}

}  // namespace
}  // namespace specdec::cuda
