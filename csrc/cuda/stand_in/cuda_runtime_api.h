// As much of the CUDA runtime as ops.cpp uses, where there is no GPU; see ../stand_in.cpp.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
using cudaStream_t = void*;

namespace specdec::cuda::stand_in {
// Set by the functions that stand_in.cpp exports.
inline cudaStream_t stream = nullptr;
inline bool capturing = false, idle = false;
inline int asked = 0, cleared = 0, launched = 0;
}  // namespace specdec::cuda::stand_in

inline const char* cudaGetErrorString(cudaError_t) { return "the launch failed"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrComputeCapabilityMajor) {
    *value = std::getenv("SPECDEC_STAND_IN_OLD_GPU") != nullptr ? 7 : 9;
    return cudaSuccess;
  }
  ++specdec::cuda::stand_in::asked;
  *value = 132;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t) {
  ++specdec::cuda::stand_in::cleared;
  std::memset(memory, value, size);
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = specdec::cuda::stand_in::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
