// What csrc/cuda/device.cu needs of CUDA's runtime, as CUDA 12 and newer have it: choosing a device makes its context.
#pragma once

#include <cstring>

#define CUDART_VERSION 13000

enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice = 101, cudaErrorNotSupported = 801 };
enum { cudaEnableDefault };

struct FakeRuntime {
  int devices, current;
  unsigned contexts;  // a bit per device
  bool asks;          // whether the driver tells of contexts
};
inline FakeRuntime fake;

inline int fake_state(int device, unsigned*, int* active) {
  *active = fake.contexts >> device & 1;
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = fake.devices;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = fake.current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device >= fake.devices) return cudaErrorInvalidDevice;
  fake.current = device;
  fake.contexts |= 1u << device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, int, void*) {
  if (!fake.asks || version != 7000 || std::strcmp(name, "cuDevicePrimaryCtxGetState")) return cudaErrorNotSupported;
  *function = reinterpret_cast<void*>(&fake_state);
  return cudaSuccess;
}
