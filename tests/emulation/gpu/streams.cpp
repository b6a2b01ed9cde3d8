// SPDX-License-Identifier: MIT
#include "streams.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>

#include "cuda_runtime_api.h"
#include "memory.h"

namespace emulation {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
using c10::StreamId;

thread_local DeviceIndex device_of_thread = 0;
thread_local StreamId streams_of_thread[kDevices] = {};

// One piece of work at a time, in all threads.
std::recursive_mutex& lock() {
  static std::recursive_mutex mutex;
  return mutex;
}

// Never destroyed: tensors are freed after it would be.
std::map<std::pair<DeviceIndex, StreamId>, Queue>& queues() {
  static auto& queues = *new std::map<std::pair<DeviceIndex, StreamId>, Queue>;
  return queues;
}

std::vector<void*>& freed_meanwhile() {
  static auto& freed = *new std::vector<void*>;
  return freed;
}

bool waiting_is_forbidden = false;
std::atomic<int64_t> launch_count{0};

}  // namespace

Kept::~Kept() {
  work.clear();
  for (void* memory : freed) give_back(memory);
}

void Kept::run() const {
  const std::lock_guard guard(lock());
  for (const auto& piece : work) TORCH_CHECK(piece(), "CUDA error: a launch was refused");
}

DeviceIndex current_device() { return device_of_thread; }

void set_current_device(DeviceIndex device) {
  TORCH_CHECK(device >= 0 && device < kDevices, "CUDA error: invalid device ordinal");
  device_of_thread = device;
}

Stream current_stream(DeviceIndex device) {
  if (device < 0) device = device_of_thread;
  return Stream(Stream::UNSAFE, Device(c10::kCUDA, device), streams_of_thread[device]);
}

void set_current_stream(Stream stream) { streams_of_thread[stream.device_index()] = stream.id(); }

Stream new_stream(Device device) {
  static std::atomic<StreamId> last{0};
  if (!device.has_index()) device.set_index(device_of_thread);
  return Stream(Stream::UNSAFE, device, ++last);
}

Queue* queue_of(Stream stream) {
  const std::lock_guard guard(lock());
  const auto [place, is_new] = queues().try_emplace(std::pair(stream.device_index(), stream.id()));
  Queue& queue = place->second;
  if (is_new) {
    queue.device = stream.device_index();
    queue.is_default = stream.id() == 0;
    if (!queue.is_default) sleep(&queue);
  }
  return &queue;
}

Queue* current_queue() { return queue_of(current_stream(device_of_thread)); }

void wait_for_all() {
  const std::lock_guard guard(lock());
  for (const auto& [key, queue] : queues()) {
    TORCH_CHECK(!queue.is_captured(),
                "CUDA error: operation not permitted when stream is capturing");
  }
  for (auto& [key, queue] : queues()) {
    const auto kept = std::exchange(queue.kept, nullptr);
    if (!queue.is_default) sleep(&queue);
    if (kept != nullptr) kept->run();
  }
  for (void* memory : std::exchange(freed_meanwhile(), {})) give_back(memory);
}

void wait(const char* name) {
  TORCH_CHECK(!waiting_is_forbidden, "called a synchronizing CUDA operation: ", name);
  wait_for_all();
}

void forbid_waiting(bool forbid) { waiting_is_forbidden = forbid; }

void sleep(Queue* queue) {
  if (queue->kept == nullptr) queue->kept = std::make_shared<Kept>();
}

void begin_capture(Queue* queue) {
  wait_for_all();
  sleep(queue);
  queue->kept->captured = true;
}

std::shared_ptr<Kept> end_capture(Queue* queue) {
  std::shared_ptr<Kept> graph = std::exchange(queue->kept, nullptr);
  if (!queue->is_default) sleep(queue);
  return graph;
}

std::shared_ptr<Kept> captured() {
  const std::lock_guard guard(lock());
  for (const auto& [key, queue] : queues()) {
    if (queue.is_captured()) return queue.kept;
  }
  return nullptr;
}

bool keep_freed(void* memory) {
  const std::lock_guard guard(lock());
  const bool is_pending = std::any_of(queues().begin(), queues().end(),
                                      [](const auto& entry) { return !entry.second.is_done(); });
  if (is_pending) freed_meanwhile().push_back(memory);
  return is_pending;
}

int64_t launches() { return launch_count; }
void count_launch() { ++launch_count; }

bool enqueue(Queue* queue, std::function<bool()> work) {
  const std::lock_guard guard(lock());
  // As CUDA has it: a stream belongs to a device, which must be the current one.
  if (queue->device != device_of_thread) return false;
  count_launch();
  const auto on_device = [device = queue->device, work = std::move(work)] {
    const OthersMemoryIsClosed closed(device);
    return work();
  };
  if (queue->kept == nullptr) return on_device();
  queue->kept->work.emplace_back(on_device);
  return true;
}

}  // namespace emulation
