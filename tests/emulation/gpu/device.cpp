// SPDX-License-Identifier: MIT
// What torch asks of a device: guards, streams, events, and the hooks by which it finds CUDA.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"
#include "streams.h"

namespace emulation {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::kCUDA; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Device getDevice() const override { return {c10::kCUDA, current_device()}; }
  void setDevice(Device device) const override {
    if (device.has_index()) set_current_device(device.index());
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    set_current_device(device.index());
  }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }

  Stream getStream(Device device) const override { return current_stream(device.index()); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int /*priority*/) const override { return new_stream(device); }
  Stream getStreamFromGlobalPool(Device device, bool /*is_high_priority*/) const override {
    return new_stream(device);
  }
  Stream exchangeStream(Stream stream) const override {
    const Stream before = current_stream(stream.device_index());
    set_current_stream(stream);
    return before;
  }
  bool queryStream(const Stream& stream) const override { return queue_of(stream)->is_done(); }
  bool isStreamCapturing(const Stream& stream) const override {
    return queue_of(stream)->is_captured();
  }

  // Whoever waits for one event, a stream or the host, waits for everything.
  void record(void** event, const Stream& /*stream*/, DeviceIndex /*device*/,
              c10::EventFlag /*flag*/) const override {
    static char recorded;
    *event = &recorded;
  }
  void destroyEvent(void* /*event*/, DeviceIndex /*device*/) const noexcept override {}
  void block(void* /*event*/, const Stream& stream) const override {
    if (!queue_of(stream)->is_captured()) wait_for_all();
  }
  bool queryEvent(void* /*event*/) const override { return true; }
  void synchronizeStream(const Stream& /*stream*/) const override { wait_for_all(); }
  void synchronizeEvent(void* /*event*/) const override { wait_for_all(); }
  void synchronizeDevice(DeviceIndex /*device*/) const override { wait_for_all(); }
  void recordDataPtrOnStream(const c10::DataPtr& /*data*/, const Stream& /*s*/) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

class Hooks final : public at::CUDAHooksInterface {
 public:
  explicit Hooks(at::CUDAHooksArgs /*args*/) {}

  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex /*device*/) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return emulation::current_device(); }
  DeviceIndex getCurrentDevice() const override { return emulation::current_device(); }
  void setCurrentDevice(DeviceIndex device) const override { set_current_device(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    const DeviceIndex before = emulation::current_device();
    set_current_device(device);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? emulation::current_device() : exchangeDevice(device);
  }
  // The CPU's: its operators draw the numbers.
  at::Generator getNewGenerator(DeviceIndex /*device*/) const override {
    return at::detail::createCPUGenerator();
  }
  const at::Generator& getDefaultGenerator(DeviceIndex /*device*/) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_memory(); }
  void deviceSynchronize(DeviceIndex /*device*/) const override { wait_for_all(); }
};

}  // namespace
}  // namespace emulation

namespace at {
// Found by its name when torch asks for CUDA for the first time.
using EmulatedHooks = emulation::Hooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", EmulatedHooks)
}  // namespace at
