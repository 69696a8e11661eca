// The CUDA backend on a CPU, for tests and to time its host's side: ops.cpp and the kernels as they are, with a
// stand-in for the CUDA runtime. What it does not show is what depends on the machine, as the shuffles of a warp do.
#define SPECDEC_LIBRARY specdec_emulated
#define SPECDEC_KEY CPU
#define SPECDEC_DEVICE_TYPE aoti_torch_device_type_cpu
#include "ops.cpp"  // NOLINT(bugprone-suspicious-include)

#include <numeric>
#include <random>
#include <thread>

#include "thread_block.h"

namespace specdec::cuda {
namespace {

// What is in memory before a launch is anything but the counters, which are 0 before and after.
void poison(const auto&) {}
void poison(const Plan& plan) { std::memset(plan.judged, 0xFF, size_t(plan.bytes() - plan.counter_bytes)); }
void check_counters(const auto&) {}
void check_counters(const Plan& plan) {
  for (int64_t i = 0; i < plan.counter_bytes / int64_t(sizeof(uint32_t)); ++i)
    STD_TORCH_CHECK(plan.counters[i] == 0, "a counter was left at ", plan.counters[i]);
}

std::mutex launches;  // follow each other on a stream

// Blocks that wait for each other run together, each by its threads. Of others kAtOnce run side by side, in an order of
// SPECDEC_EMULATED_ORDER's own.
constexpr int64_t kAtOnce = kThreads == 1 ? 1 : 3;
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, bool together, cudaStream_t,
                          const Arguments&... arguments) {
  const std::lock_guard lock(launches);
  ++emulated::launched;
  if (emulated::idle) return cudaSuccess;
  (check_counters(arguments), ...);
  (poison(arguments), ...);
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), int64_t(0));
  if (const int seed = emulated::setting("SPECDEC_EMULATED_ORDER", 0))
    std::shuffle(order.begin(), order.end(), std::mt19937_64(uint64_t(seed)));
  const int64_t at_once = together ? blocks : std::min(blocks, kAtOnce);
  const auto run = [&](BlockState& block, int rank, int64_t first) {
    for (int64_t i = first; i < blocks; i += at_once) {
      current = {&block, rank, order[size_t(i)]};
      kernel(arguments...);
      block::sync();  // the memory of one block is the next one's
    }
  };
  std::vector<std::unique_ptr<BlockState>> all;
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < at_once; ++first) {
    BlockState& block = *all.emplace_back(std::make_unique<BlockState>());
    if (at_once * kThreads == 1)
      run(block, 0, first);
    else
      for (int rank = 0; rank < kThreads; ++rank) threads.emplace_back([=, &run, &block] { run(block, rank, first); });
  }
  for (std::thread& thread : threads) thread.join();
  (check_counters(arguments), ...);
  return cudaSuccess;
}

}  // namespace
}  // namespace specdec::cuda

#include "kernels_chain.cu"
#include "kernels_masks.cu"
#include "kernels_rows.cu"
#include "kernels_trees.cu"

extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  return *stream = specdec::cuda::emulated::stream, 0;
}
AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle*) { return 0; }
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }

// For tests and benchmarks, through ctypes. A device is asked anew.
__attribute__((visibility("default"))) void specdec_emulate(void* stream, bool capturing, bool idle) {
  namespace emulated = specdec::cuda::emulated;
  emulated::stream = stream, emulated::capturing = capturing, emulated::idle = idle;
}
__attribute__((visibility("default"))) void specdec_emulated_counts(int* counts) {
  using namespace specdec::cuda::emulated;
  counts[0] = asked, counts[1] = cleared, counts[2] = launched;
  asked = cleared = launched = 0;
}
__attribute__((visibility("default"))) void specdec_emulated_forget_devices() {
  specdec::cuda::processors_of_devices.clear();
}
}
