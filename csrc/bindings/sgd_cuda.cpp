// SPDX-License-Identifier: MIT
#include "bindings/sgd_cuda.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <cstring>
#include <deque>

#include "bindings/cuda_support.h"
#include "bindings/dtypes.h"
#include "bindings/linear_mse_passes.h"
#include "cuda/policy.h"

namespace fused_step {

namespace {

// Calls body(P{}, Buf{}) with the types behind a storage.
template <typename Body>
void with_types(SgdStorage storage, const Body& body) {
  switch (storage) {
    case SgdStorage::kFloat:
      return body(float{}, float{});
    case SgdStorage::kDouble:
      return body(double{}, double{});
    case SgdStorage::kBFloat16:
      return body(BFloat16{}, BFloat16{});
    case SgdStorage::kFloat16:
      return body(Float16{}, Float16{});
    case SgdStorage::kBFloat16FloatBuf:
      return body(BFloat16{}, float{});
    case SgdStorage::kFloat16FloatBuf:
      return body(Float16{}, float{});
  }
}

at::Tensor device_bytes(int64_t bytes, c10::Device device) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

// Copies `from` to `memory`, which is made anew where it is too small: by value where it is small,
// or a graph is captured, which then needs nothing of the host, and every replay writes the memory
// that it reads, whoever had it in between; otherwise by way of pinned memory of the host's caching
// allocator, which keeps it until the copy is done.
template <typename T>
void upload(const std::vector<T>& from, at::Tensor& memory, c10::cuda::CUDAStream stream,
            bool capturing) {
  const auto bytes = static_cast<int64_t>(from.size() * sizeof(T));
  const int64_t padded = cuda::round_up(bytes, cuda::kVectorBytes);
  if (!memory.defined() || memory.numel() < padded) {
    memory = at::Tensor();  // freed before the larger one is taken
    memory = device_bytes(padded, stream.device());
  }
  if (bytes == 0) return;
  if (capturing || bytes <= cuda::kMaxPutBytes) {
    C10_CUDA_CHECK(cuda::launch_put(memory.mutable_data_ptr(), from.data(), bytes, stream));
    return;
  }
  const at::Tensor host =
      at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  std::memcpy(host.mutable_data_ptr(), from.data(), static_cast<size_t>(bytes));
  memory.narrow(0, 0, bytes).copy_(host, /*non_blocking=*/true);
}

template <typename T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

at::Tensor on_device(const at::Tensor& scalar, c10::Device device) {
  if (!scalar.defined() || scalar.device() == device) return scalar;
  return scalar.to(device, /*non_blocking=*/true);
}

}  // namespace

SgdCuda::Table& SgdCuda::table_of(c10::DeviceIndex device) {
  for (Table& table : tables_) {
    if (table.device == device) return table;
  }
  tables_.emplace_back();
  tables_.back().device = device;
  return tables_.back();
}

// Rows, chunks and launches for the items on the table's device, there too.
void SgdCuda::fill(const SgdCudaStep& step, Table& table, bool capturing) {
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(table.device);
  if (table.stream != stream.id()) {
    // The old memory may be read yet, on the stream that it goes back to.
    const c10::DeviceIndex device = table.device;
    table = {};
    table.device = device;
    table.stream = stream.id();
  }
  std::vector<const SgdItem*> items;
  for (const SgdItem& item : step.items) {
    if (item.device == table.device && item.slice.n > 0) items.push_back(&item);
  }
  const auto before = [](const SgdItem* a, const SgdItem* b) {
    return a->storage != b->storage ? a->storage < b->storage : a->group < b->group;
  };
  if (!std::is_sorted(items.begin(), items.end(), before)) {
    std::stable_sort(items.begin(), items.end(), before);
  }
  std::vector<Shape> shapes;
  std::vector<cuda::SgdTensor> rows;
  shapes.reserve(items.size());
  rows.reserve(items.size());
  for (const SgdItem* item : items) {
    const cpu::SgdSlice& s = item->slice;
    shapes.push_back({item->storage, item->group, s.n});
    rows.push_back({s.param, s.grad, s.buf, s.n, s.first_step ? 1 : 0});
  }
  if (shapes != table.shapes || !table.chunks_memory.defined()) {
    std::vector<cuda::SgdChunk> chunks;
    std::vector<Launch> launches;
    for (size_t k = 0; k < shapes.size(); ++k) {
      const Shape& s = shapes[k];
      if (launches.empty() || launches.back().storage != s.storage ||
          launches.back().group != s.group) {
        launches.push_back({s.storage, s.group, static_cast<int64_t>(chunks.size()), 0});
      }
      const int64_t count = cuda::ceil_div(s.n, cuda::list_chunk(param_bytes(s.storage)));
      // 2^31 chunks are 8 TiB of float: no device has that.
      for (int64_t c = 0; c < count; ++c) {
        chunks.push_back({static_cast<int32_t>(k), static_cast<int32_t>(c)});
      }
      launches.back().count += count;
    }
    table.shapes.clear();
    upload(chunks, table.chunks_memory, stream, capturing);
    table.chunk_count = static_cast<int64_t>(chunks.size());
    table.launches = std::move(launches);
    table.shapes = std::move(shapes);
  }
  if (!same_bytes(rows, table.rows) || !table.rows_memory.defined()) {
    table.rows.clear();
    upload(rows, table.rows_memory, stream, capturing);
    table.rows = std::move(rows);
  }
}

// Everything that may fail for want of memory, before anything is changed.
SgdCuda::Ready SgdCuda::prepare(const SgdCudaStep& step, Table& table, bool capturing) {
  const c10::Device device(c10::kCUDA, table.device);
  fill(step, table, capturing);
  Ready ready{&table,
              c10::cuda::getCurrentCUDAStream(table.device),
              {},
              on_device(step.grad_scale, device),
              on_device(step.found_inf, device),
              {}};
  if (!step.max_norm.has_value()) return ready;
  // The partial sums, of which there is always one, and the factor.
  const int64_t partials = cuda::at_least(1, table.chunk_count);
  ready.scratch = reserve_scratch(table.scratch, ready.stream,
                                  (partials + 1) * static_cast<int64_t>(sizeof(double)));
  const bool is_double = !step.items.empty() && step.items[0].storage == SgdStorage::kDouble;
  ready.norm =
      at::empty({}, at::TensorOptions().dtype(is_double ? at::kDouble : at::kFloat).device(device));
  return ready;
}

namespace {

const float* float_at(const at::Tensor& t) { return read<float>(t); }

cuda::SgdChunks chunks_of(const at::Tensor& rows, const at::Tensor& chunks, int64_t first,
                          int64_t count) {
  return {static_cast<const cuda::SgdTensor*>(rows.const_data_ptr()),
          static_cast<const cuda::SgdChunk*>(chunks.const_data_ptr()) + first, count};
}

// The factor that gradients are clipped by is the first number of the workspace, before the partial
// sums.
double* clip_in(const cuda::Scratch& scratch) { return static_cast<double*>(scratch.workspace); }

}  // namespace

void SgdCuda::launch_norm(const SgdCudaStep& step, const Ready& ready) {
  const Table& table = *ready.table;
  std::vector<Launch> launches = table.launches;
  if (launches.empty()) launches.push_back({SgdStorage::kFloat, 0, 0, 0});  // the norm of nothing
  int64_t begin = 0;
  for (size_t k = 0; k < launches.size(); ++k) {
    const Launch& l = launches[k];
    const int64_t blocks = cuda::at_least(1, l.count);
    with_types(l.storage, [&](auto of_param, auto) {
      using P = decltype(of_param);
      const bool is_double = ready.norm.scalar_type() == at::kDouble;
      const cuda::GradNorm<P> args{
          chunks_of(table.rows_memory, table.chunks_memory, l.first, l.count),
          clip_in(ready.scratch) + 1,
          begin,
          begin + blocks,
          k + 1 == launches.size(),
          ready.scratch.tickets,
          step.unscale,
          float_at(ready.grad_scale),
          *step.max_norm,
          clip_in(ready.scratch),
          is_double ? nullptr : written<float>(ready.norm),
          is_double ? written<double>(ready.norm) : nullptr};
      C10_CUDA_CHECK(cuda::launch_grad_norm(args, ready.stream));
    });
    begin += blocks;
  }
}

void SgdCuda::launch_updates(const SgdCudaStep& step, const Ready& ready) {
  const Table& table = *ready.table;
  for (const Launch& l : table.launches) {
    const auto group = static_cast<size_t>(l.group);
    const at::Tensor& lr = step.lrs[group];
    const bool is_double = lr.defined() && lr.scalar_type() == at::kDouble;
    const cuda::SgdScalars scalars{is_double ? nullptr : float_at(lr),
                                   is_double ? read<double>(lr) : nullptr,
                                   float_at(ready.grad_scale), float_at(ready.found_inf),
                                   step.max_norm.has_value() ? clip_in(ready.scratch) : nullptr};
    with_types(l.storage, [&](auto of_param, auto of_buf) {
      const cuda::SgdList<decltype(of_param), decltype(of_buf)> args{
          chunks_of(table.rows_memory, table.chunks_memory, l.first, l.count),
          step.rules[group].options, scalars, step.unscale, step.grad_after};
      C10_CUDA_CHECK(cuda::launch_sgd_list(args, ready.stream));
    });
  }
}

at::Tensor SgdCuda::step(const SgdCudaStep& step) {
  const BelowDispatcher below;
  std::vector<c10::DeviceIndex> devices;
  for (const SgdItem& item : step.items) {
    if (item.device != kOnCpu &&
        std::find(devices.begin(), devices.end(), item.device) == devices.end()) {
      devices.push_back(item.device);
    }
  }
  std::deque<Table> captured;  // of this step alone: what a graph reads is nobody else's to write
  std::vector<Ready> ready;
  for (const c10::DeviceIndex device : devices) {
    const c10::cuda::CUDAGuard guard(device);
    const bool capturing = is_capturing(c10::cuda::getCurrentCUDAStream(device));
    if (capturing) captured.emplace_back().device = device;
    ready.push_back(prepare(step, capturing ? captured.back() : table_of(device), capturing));
  }
  for (const Ready& r : ready) {
    const c10::cuda::CUDAGuard guard(r.table->device);
    if (step.max_norm.has_value()) launch_norm(step, r);
    launch_updates(step, r);
  }
  return step.max_norm.has_value() && !ready.empty() ? ready[0].norm : at::Tensor();
}

}  // namespace fused_step
