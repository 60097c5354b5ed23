// Lets torch take a device "cuda:0" for real, as far as tensors without memory need it.
//
// Two registries are filled in: the device guard, which autograd asks for streams and events, and the
// hooks by which torch asks what the build can do. The device has cuDNN, so that convolutions choose
// the memory formats that they would choose there. Nothing here computes; of streams there is the number
// of each thread's current one, and Python is told of the events. torch may be built with CUDA or
// without; what it brings of its own gives way.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdint>
#include <utility>

namespace {

thread_local c10::StreamId current = 0;
// Called when a stream waits for an event, or else records it.
using OnEvent = void (*)(bool waits, std::int64_t event, std::int64_t stream);
OnEvent on_event = nullptr;
std::atomic<std::intptr_t> events{0};

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device device() { return {DeviceType::CUDA, 0}; }
  static Stream stream(c10::StreamId id) { return Stream(Stream::UNSAFE, device(), id); }

  Device getDevice() const override { return device(); }
  Device exchangeDevice(Device) const override { return device(); }
  Stream getStream(Device) const noexcept override { return stream(current); }
  Stream getNewStream(Device, int) const override { return stream(current); }
  Stream getDefaultStream(Device) const override { return stream(0); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return stream(current); }
  Stream exchangeStream(Stream next) const noexcept override {
    return stream(std::exchange(current, next.id()));
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void record(void** event, const Stream& at, const DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = reinterpret_cast<void*>(++events);
    on_event(false, reinterpret_cast<std::intptr_t>(*event), at.id());
  }
  void block(void* event, const Stream& waiting) const override {
    on_event(true, reinterpret_cast<std::intptr_t>(event), waiting.id());
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

// torch looks for hooks of this name. Without `override` are those that not all its releases have.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const {}
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }

  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  double batchnormMinEpsilonCuDNN() const override { return 1e-5; }
  long versionCuDNN() const override { return 91000; }
  long versionRuntimeCuDNN() const { return 91000; }
  long versionCuDNNFrontend() const { return 11400; }
};

}  // namespace

namespace at {
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, CUDAHooks)
}

// To be called when torch has been loaded, since of two guards the later one stays.
extern "C" void pretend(OnEvent function) {
  on_event = function;
  c10::impl::registerDeviceGuard(DeviceType::CUDA, new Guard());
}

extern "C" std::int64_t current_stream() { return current; }
extern "C" void set_stream(std::int64_t id) { current = id; }
