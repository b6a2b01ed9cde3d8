// SPDX-License-Identifier: MIT
// Devices and streams of the emulated GPUs. Work on a default stream is done at once; on another,
// or on one that sleeps, when somebody waits; on a captured one, when its graph is replayed.
#pragma once

#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace emulation {

constexpr c10::DeviceIndex kDevices = 2;

// Work in order, for later.
struct Kept {
  std::vector<std::function<bool()>> work;  // false: refused
  std::vector<void*> freed;                 // memory that a graph goes on using
  bool captured = false;

  ~Kept();
  void run() const;
};

struct Queue {
  c10::DeviceIndex device;
  bool is_default;
  std::shared_ptr<Kept> kept;  // null: work is done at once

  bool is_captured() const { return kept != nullptr && kept->captured; }
  bool is_done() const { return kept == nullptr || kept->work.empty(); }
};

// Of the calling thread.
c10::DeviceIndex current_device();
void set_current_device(c10::DeviceIndex device);
c10::Stream current_stream(c10::DeviceIndex device);
void set_current_stream(c10::Stream stream);

c10::Stream new_stream(c10::Device device);
Queue* queue_of(c10::Stream stream);
Queue* current_queue();

// Everything that was left for later is done, but for captures: then it is an error.
void wait_for_all();
// The host waits in an operation of this name. An error where that is forbidden.
void wait(const char* name);
void forbid_waiting(bool forbid);

void sleep(Queue* queue);
void begin_capture(Queue* queue);
std::shared_ptr<Kept> end_capture(Queue* queue);

// The graph that is being captured, null if there is none.
std::shared_ptr<Kept> captured();
// Keeps memory that is freed while work that may read it is still to be done. False: nobody does.
bool keep_freed(void* memory);

int64_t launches();
void count_launch();

}  // namespace emulation
