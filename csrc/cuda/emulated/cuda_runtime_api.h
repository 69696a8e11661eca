// As much of the CUDA runtime as the host's side of the backend uses, where there is no GPU; see ../emulated.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#define CUDART_VERSION 0
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation, cudaErrorStreamCaptureUnsafe };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
using cudaStream_t = void*;

namespace specdec::cuda::emulated {
// Set by the functions that emulated.cpp exports. Idle: nothing that is launched runs.
inline cudaStream_t stream = nullptr;
inline bool capturing = false, idle = false;
inline thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
// How often a device was asked what it is, memory was cleared, something was launched.
inline int asked = 0, cleared = 0, launched = 0;

inline int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? int(std::strtol(value, nullptr, 10)) : otherwise;
}
}  // namespace specdec::cuda::emulated

inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace specdec::cuda::emulated;
  const bool processors = attribute == cudaDevAttrMultiProcessorCount;
  asked += processors;
  *value = processors ? setting("SPECDEC_EMULATED_PROCESSORS", 1) : setting("SPECDEC_EMULATED_CAPABILITY", 9);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** memory, size_t size) {
  if (specdec::cuda::emulated::setting("SPECDEC_EMULATED_FULL", 0)) return cudaErrorMemoryAllocation;
  *memory = std::malloc(size);
  // As if another thread captured.
  return specdec::cuda::emulated::mode == cudaStreamCaptureModeRelaxed ? cudaSuccess : cudaErrorStreamCaptureUnsafe;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t) {
  ++specdec::cuda::emulated::cleared;
  std::memset(memory, value, size);
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = specdec::cuda::emulated::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, specdec::cuda::emulated::mode), cudaSuccess;
}
