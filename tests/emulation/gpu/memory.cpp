// SPDX-License-Identifier: MIT
#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "streams.h"

namespace emulation {
namespace {

using c10::DeviceIndex;

constexpr size_t kPageBytes = 4096;

struct Block {
  size_t bytes;
  DeviceIndex device;
  std::weak_ptr<Kept> graph;  // that it was made for, and that has it for good
};

// Never destroyed: tensors are freed after it would be.
struct Books {
  std::mutex lock;
  std::map<void*, Block> blocks;
  size_t now = 0;
  size_t most = 0;
};
Books& books() {
  static auto& books = *new Books;
  return books;
}

void release(void* memory) {
  std::shared_ptr<Kept> graph = captured();
  {
    const std::lock_guard guard(books().lock);
    const Block& block = books().blocks.at(memory);
    books().now -= block.bytes;
    if (graph == nullptr) graph = block.graph.lock();
  }
  if (graph != nullptr) {
    graph->freed.push_back(memory);
  } else if (!keep_freed(memory)) {
    give_back(memory);
  }
}

class DeviceMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const DeviceIndex device = current_device();
    if (bytes == 0) return {nullptr, c10::Device(c10::kCUDA, device)};
    // Whole pages where they are to be closed.
    const size_t unit = device == 0 ? 512 : kPageBytes;
    const size_t rounded = (bytes + unit - 1) / unit * unit;
    void* const memory = std::aligned_alloc(unit, rounded);
    TORCH_CHECK_WITH(OutOfMemoryError, memory != nullptr, "CUDA out of memory: ", bytes, " bytes");
    std::memset(memory, 0xff, rounded);
    const std::shared_ptr<Kept> graph = captured();
    Books& b = books();
    const std::lock_guard guard(b.lock);
    b.blocks[memory] = {rounded, device, graph};
    b.now += rounded;
    b.most = std::max(b.most, b.now);
    return {memory, memory, &release, c10::Device(c10::kCUDA, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

// Never given to anybody again: a graph that copies from it after it was freed copies all ones.
void release_pinned(void* memory) {
  const size_t bytes = *(static_cast<size_t*>(memory) - kPageBytes / sizeof(size_t));
  std::memset(memory, 0xff, bytes);
}

class PinnedMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t rounded = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    void* const start = std::aligned_alloc(kPageBytes, rounded + kPageBytes);
    *static_cast<size_t*>(start) = bytes;
    void* const memory = static_cast<char*>(start) + kPageBytes;
    return {memory, memory, &release_pinned, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

DeviceMemory device;
PinnedMemory pinned;
const bool registered = [] {
  c10::SetAllocator(c10::kCUDA, &device);
  return true;
}();

void protect_others(DeviceIndex device, int protection) {
  const std::lock_guard guard(books().lock);
  for (const auto& [memory, block] : books().blocks) {
    if (block.device != 0 && block.device != device) mprotect(memory, block.bytes, protection);
  }
}

}  // namespace

c10::Allocator* device_memory() { return &device; }
c10::Allocator* pinned_memory() { return &pinned; }

void give_back(void* memory) {
  size_t bytes = 0;
  {
    const std::lock_guard guard(books().lock);
    bytes = books().blocks.extract(memory).mapped().bytes;
  }
  std::memset(memory, 0xff, bytes);
  std::free(memory);
}

size_t allocated() { return books().now; }
size_t most_allocated() { return books().most; }
void reset_most_allocated() { books().most = books().now; }

OthersMemoryIsClosed::OthersMemoryIsClosed(DeviceIndex device) : device_(device) {
  protect_others(device_, PROT_NONE);
}
OthersMemoryIsClosed::~OthersMemoryIsClosed() { protect_others(device_, PROT_READ | PROT_WRITE); }

}  // namespace emulation
