// Whether there is a GPU, which one launches go to, and what its errors mean.
#include <cuda_runtime.h>

#include "cuda/decode.h"

namespace ssd::cuda {
namespace {

// Whether a device has a context in this process. Where the driver cannot be asked, it may have.
bool has_context(int device) {
  using GetState = int (*)(int device, unsigned* flags, int* active);  // of the driver, which is not linked
  void* get_state = nullptr;
  constexpr char kName[] = "cuDevicePrimaryCtxGetState";
#if CUDART_VERSION >= 12050
  if (cudaGetDriverEntryPointByVersion(kName, &get_state, 7000, cudaEnableDefault, nullptr)) return true;
#else
  if (cudaGetDriverEntryPoint(kName, &get_state, cudaEnableDefault)) return true;
#endif
  unsigned flags = 0;
  int active = 1;
  return !get_state || reinterpret_cast<GetState>(get_state)(device, &flags, &active) || active;
}

}  // namespace

const char* unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? nullptr : "no CUDA device";
}

int use_device(int device, int* before) {
  const cudaError_t error = cudaGetDevice(before);
  if (error != cudaSuccess || *before == device) return error;
  // From CUDA 12 on, cudaSetDevice makes a context, which takes hundreds of megabytes: going back must not.
  if (!has_context(*before)) *before = device;
  return cudaSetDevice(device);
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ssd::cuda
