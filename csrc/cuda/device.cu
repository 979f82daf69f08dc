// Whether there is a GPU, which one launches go to, and what its errors mean.
#include <cuda_runtime.h>

#include "cuda/decode.h"

namespace ssd::cuda {

const char* unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? nullptr : "no CUDA device";
}

int use_device(int device, int* before) {
  const cudaError_t error = cudaGetDevice(before);
  return error != cudaSuccess || *before == device ? error : cudaSetDevice(device);
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ssd::cuda
