// The choice of a device around a launch, as csrc/bindings_cuda.h makes it, on a fake runtime.
#include "cuda/device.cu"

// Returns 0 or an error; what is current and which devices have a context afterwards, in `current` and `contexts`.
extern "C" int launch_on(int device, int* current, unsigned* contexts, int devices, int asks) {
  fake = {devices, *current, *contexts, asks != 0};
  int before = 0;
  const int error = ssd::cuda::use_device(device, &before);
  if (!error && before != device) ssd::cuda::use_device(before, &device);
  *current = fake.current;
  *contexts = fake.contexts;
  return error;
}
