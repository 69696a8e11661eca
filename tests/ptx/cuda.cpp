// The CUDA backend as nvcc compiles it, for tensors on a CPU: with a CUDA runtime that has no GPU, but hands what is
// launched to tests/helpers/ptx.py, which executes the PTX.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <c10/core/Allocator.h>  // which is not in the stable ABI
#pragma pop_macro("TORCH_TARGET_VERSION")

#define SPECDEC_LIBRARY specdec_ptx
#define SPECDEC_KEY CPU
#define SPECDEC_DEVICE_TYPE aoti_torch_device_type_cpu
#include "../../csrc/cuda/ops.cpp"  // NOLINT(bugprone-suspicious-include)

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

// What kernels may touch: of tensors, and what the runtime allocated. As on a GPU it begins at 512 bytes, and what
// is in it before it is written is no number.
class Memory final : public c10::Allocator {
 public:
  void* make(size_t size) {
    constexpr size_t kAlignment = 512;
    void* const memory = std::aligned_alloc(kAlignment, (size / kAlignment + 1) * kAlignment);
    std::memset(memory, 0xFF, size);
    const std::lock_guard lock(mutex_);
    sizes_[reinterpret_cast<uint64_t>(memory)] = size;
    return memory;
  }
  c10::DataPtr allocate(size_t size) override {
    void* const memory = size ? make(size) : nullptr;
    return {memory, memory, raw_deleter(), c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
  void release(void* memory) {
    {
      const std::lock_guard lock(mutex_);
      sizes_.erase(reinterpret_cast<uint64_t>(memory));
    }
    std::free(memory);
  }
  // Pairs of addresses.
  std::vector<uint64_t> regions() {
    const std::lock_guard lock(mutex_);
    std::vector<uint64_t> all;
    for (const auto& [begin, size] : sizes_) all.insert(all.end(), {begin, begin + size});
    return all;
  }

 private:
  std::mutex mutex_;
  std::map<uint64_t, uint64_t> sizes_;
};

Memory& memory() {
  static auto* const all = new Memory;  // tensors may outlive what is destroyed at the end
  return *all;
}
c10::DeleterFnPtr Memory::raw_deleter() const {
  return [](void* each) { memory().release(each); };
}

// The names of kernels, by what stands for them on the host; made while libraries are loaded, in any order.
std::map<const void*, const char*>& kernels() {
  static std::map<const void*, const char*> all;
  return all;
}

// Executes a launch; false with what went wrong in `error`.
using Launched = bool (*)(const char* kernel, unsigned blocks, bool together, void** arguments, const uint64_t* regions,
                          int count, char* error, int size);
Launched launched = nullptr;
int processors = 1;
char error_text[1000];

}  // namespace

extern "C" {
// From now on tensors have memory that is watched, and what is launched goes there.
__attribute__((visibility("default"))) void ptx_connect(Launched to) {
  launched = to;
  c10::SetAllocator(c10::kCPU, &memory());
}
// Another GPU, with so many multiprocessors.
__attribute__((visibility("default"))) void ptx_set_processors(int count) {
  processors = count;
  specdec::cuda::processors_of_devices.clear();
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle*) { return 0; }
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }

const char* cudaGetErrorString(cudaError_t) { return error_text; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? processors : 9;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMalloc(void** made, size_t size) { return *made = memory().make(size), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  return std::memset(to, value, size), cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  const bool together = config->numAttrs > 0 && config->attrs->id == cudaLaunchAttributeCooperative;
  const unsigned blocks = config->gridDim.x;
  if (config->blockDim.x != 256 || (together && blocks > unsigned(specdec::cuda::kBlocksAProcessor * processors))) {
    std::strcpy(error_text, "not a launch of this backend");
    return cudaErrorInvalidConfiguration;
  }
  const std::vector<uint64_t> regions = memory().regions();
  const bool done = launched(kernels().at(kernel), blocks, together, arguments, regions.data(), int(regions.size() / 2),
                             error_text, sizeof error_text);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

// What nvcc calls of its runtime to make kernels known; and, which nothing here does, to launch them by <<<>>>.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernels()[kernel] = name;
}
int __cudaGetKernel(void*, const void*) { return cudaErrorNotSupported; }
int __cudaPopCallConfiguration(void*, void*, void*, void*) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
int __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
}
