// SPDX-License-Identifier: MIT
#include "bindings/cuda_support.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <sstream>

#include "bindings/dtypes.h"
#include "cuda/policy.h"

namespace fused_step {
namespace {

struct Arch {
  int number;     // 10 * major + minor
  bool ptx;       // compiled by the driver for every later one
  bool specific;  // 9.0a: runs on exactly that one
};

Arch parse_arch(const std::string& name) {
  const size_t point = name.find('.');
  return {10 * std::stoi(name.substr(0, point)) + (name[point + 1] - '0'),
          name.find("+PTX") != std::string::npos,
          name.find_first_of("af", point) != std::string::npos};
}

bool runs(const Arch& arch, int device) {
  if (arch.number == device) return true;
  if (arch.specific || arch.number > device) return false;
  return arch.ptx || arch.number / 10 == device / 10;
}

bool find_out(c10::DeviceIndex index) {
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  for (const std::string& name : cuda_archs()) {
    if (runs(parse_arch(name), 10 * major + minor)) return true;
  }
  return false;
}

}  // namespace

std::vector<std::string> cuda_archs() {
  std::istringstream names(FUSED_STEP_CUDA_ARCHS);
  std::vector<std::string> archs;
  for (std::string name; names >> name;) archs.push_back(name);
  return archs;
}

bool is_served_by_cuda(c10::Device device) {
  enum : int8_t { kUnknown, kServed, kNot };
  static std::array<std::atomic<int8_t>, 64> known{};
  const c10::DeviceIndex index = device.index();
  if (index < 0 || static_cast<size_t>(index) >= known.size()) return false;
  if (known[index] == kUnknown) known[index] = find_out(index) ? kServed : kNot;
  return known[index] == kServed;
}

void bind_to_thread(c10::Device device) { C10_CUDA_CHECK(cudaSetDevice(device.index())); }

bool is_capturing(c10::cuda::CUDAStream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

cuda::Scratch reserve_scratch(DeviceScratch& kept, c10::cuda::CUDAStream stream, int64_t bytes) {
  const c10::Device device = stream.device();
  if (!kept.tickets.defined() || kept.tickets.device() != device || kept.stream != stream.id()) {
    kept = {};
    const at::Tensor tickets =
        at::empty({cuda::kTickets}, at::TensorOptions().dtype(at::kInt).device(device));
    C10_CUDA_CHECK(cudaMemsetAsync(tickets.mutable_data_ptr(), 0, tickets.nbytes(), stream));
    kept.tickets = tickets;
    kept.stream = stream.id();
  }
  if (!kept.workspace.defined() || kept.workspace.numel() < bytes) {
    kept.workspace = at::Tensor();  // freed before the larger one is taken
    kept.workspace = at::empty({std::max<int64_t>(bytes, 16)},
                               at::TensorOptions().dtype(at::kByte).device(device));
  }
  return {kept.workspace.mutable_data_ptr(), written<unsigned>(kept.tickets)};
}

void gemm_into(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double scale) {
  at::Tensor result = out;
  if (out.scalar_type() == a.scalar_type()) {
    // Where it is scaled, that is in the type that cuBLAS sums in. Of `result` nothing is read.
    scale == 1.0 ? at::mm_out(result, a, b) : at::addmm_out(result, result, a, b, 0.0, scale);
    return;
  }
  // With sums in float16, which torch may be told to make, cuBLAS has no wider result.
  const bool sums_in_half =
      a.scalar_type() == at::kHalf && at::globalContext().allowFP16AccumulationCuBLAS();
  if (is_16_bit(a.scalar_type()) && out.scalar_type() == at::kFloat && !sums_in_half) {
    at::mm_out(result, a, b, at::kFloat);
  } else {
    result.copy_(at::mm(a, b));
  }
  if (scale != 1.0) result.mul_(scale);
}

}  // namespace fused_step
