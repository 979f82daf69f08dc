// How many blocks of a kernel a multiprocessor runs at once, by CUDA's own rules and without a GPU. For every line of
// the input, "capability registers static_shared dynamic_shared threads", it prints one number.
#include <cuda_occupancy.h>

#include <cstdio>

namespace {

struct Device {
  int capability, multiprocessors, shared_kib, threads;
};

// NVIDIA A100, A10 and H100. Blocks per multiprocessor (32, 16, 32) are the header's, by capability.
constexpr Device kDevices[] = {{80, 108, 164, 2048}, {86, 72, 100, 1536}, {90, 132, 228, 2048}};

int blocks(const Device& device, int registers, int static_shared, int dynamic_shared, int threads) {
  cudaOccDeviceProp properties;
  properties.computeMajor = device.capability / 10;
  properties.computeMinor = device.capability % 10;
  properties.maxThreadsPerBlock = 1024;
  properties.maxThreadsPerMultiprocessor = device.threads;
  properties.regsPerBlock = properties.regsPerMultiprocessor = 65536;
  properties.warpSize = 32;
  properties.sharedMemPerBlock = 48 * 1024;
  properties.sharedMemPerBlockOptin = (device.shared_kib - 1) * 1024;
  properties.sharedMemPerMultiprocessor = device.shared_kib * 1024;
  properties.reservedSharedMemPerBlock = 1024;
  properties.numSms = device.multiprocessors;

  cudaOccFuncAttributes function;
  function.maxThreadsPerBlock = threads;
  function.numRegs = registers;
  function.sharedSizeBytes = static_shared;
  function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  function.maxDynamicSharedSizeBytes = dynamic_shared;
  function.numBlockBarriers = 1;

  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;  // as csrc/cuda/port.cuh asks for

  cudaOccResult result;
  const cudaOccError error =
      cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &function, &state, threads, dynamic_shared);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}

}  // namespace

int main() {
  int capability, registers, static_shared, dynamic_shared, threads;
  while (std::scanf("%d %d %d %d %d", &capability, &registers, &static_shared, &dynamic_shared, &threads) == 5) {
    int found = -1;
    for (const Device& device : kDevices)
      if (device.capability == capability) found = blocks(device, registers, static_shared, dynamic_shared, threads);
    if (found < 0) {
      std::fprintf(stderr, "no answer for sm_%d with %d threads\n", capability, threads);
      return 1;
    }
    std::printf("%d\n", found);
  }
}
