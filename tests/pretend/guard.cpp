// What torch asks a backend about devices, for the device type CUDA in builds of torch that have none. The current
// device is the calling thread's; there are no streams here (`machine.Stream` has them).
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

thread_local c10::DeviceIndex current = 0;
int device_count = 1;

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device getDevice() const override { return c10::Device(type(), current); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count); }
  c10::Stream getStream(c10::Device device) const noexcept override { return default_stream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return default_stream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }

 private:
  static c10::Stream default_stream(c10::Device device) { return c10::Stream(c10::Stream::DEFAULT, device); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace

extern "C" int pretended_current_device() { return current; }
extern "C" void pretended_set_device(int device) { current = static_cast<c10::DeviceIndex>(device); }
extern "C" void pretended_set_device_count(int count) { device_count = count; }
