// SPDX-License-Identifier: MIT
// Floors of a training step on a CPU: what a call costs, one read of x, one update in place.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>

namespace {

// Two tensors in, a new 0-dim tensor out, as a step does; nothing is computed.
at::Tensor Call(const at::Tensor& x, const at::Tensor& /*target*/) {
  return at::empty({}, x.options());
}

constexpr int kVec = 8;
// 8 independent sums: an addition takes 4 cycles and two start in each, so fewer would wait.
constexpr int kSums = 8;
constexpr int64_t kStride = kVec * kSums;

typedef float Vec __attribute__((vector_size(kVec * sizeof(float))));
typedef float UnalignedVec __attribute__((vector_size(kVec * sizeof(float)), aligned(4)));

// Sums x[0, n). Compiled once for each caller's target. No software prefetch: with one, a page or
// two ahead, a read of 256 MiB was not faster.
static inline __attribute__((always_inline)) float SumBody(const float* x,  // [n]
                                                           int64_t n) {
  Vec sums[kSums] = {};
  int64_t i = 0;
  for (; i + kStride <= n; i += kStride) {
    for (int s = 0; s < kSums; ++s) {
      sums[s] += *reinterpret_cast<const UnalignedVec*>(x + i + s * kVec);
    }
  }
  float total = 0.0f;
  for (int s = 0; s < kSums; ++s) {
    for (int v = 0; v < kVec; ++v) total += sums[s][v];
  }
  for (; i < n; ++i) total += x[i];
  return total;
}

float SumBaseline(const float* x, int64_t n) { return SumBody(x, n); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) float SumAvx2(const float* x, int64_t n) { return SumBody(x, n); }

float Sum(const float* x, int64_t n) {
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  return has_avx2 ? SumAvx2(x, n) : SumBaseline(x, n);
}
#else
float Sum(const float* x, int64_t n) { return SumBaseline(x, n); }
#endif

// Reads every float of x once on all threads. The sum is returned so that the reads must happen.
double Read(const at::Tensor& x, const at::Tensor& /*target*/) {
  if (x.scalar_type() != at::kFloat || !x.is_contiguous()) {
    throw std::invalid_argument("read: x must be contiguous float32");
  }
  const float* data = x.const_data_ptr<float>();
  std::atomic<double> total{0.0};
  // 32 Ki floats take about as long as it takes to wake the other threads.
  at::parallel_for(0, x.numel(), 32768, [&](int64_t begin, int64_t end) {
    const double part = Sum(data + begin, end - begin);
    double seen = total.load();
    while (!total.compare_exchange_weak(seen, seen + part)) {
    }
  });
  return total.load();
}

// p[0, n) += g[0, n) * a, in place.
static inline __attribute__((always_inline)) void TriadBody(float* p,        // [n]
                                                            const float* g,  // [n]
                                                            float a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] += g[i] * a;
}

void TriadBaseline(float* p, const float* g, float a, int64_t n) { TriadBody(p, g, a, n); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void TriadAvx2(float* p, const float* g, float a, int64_t n) {
  TriadBody(p, g, a, n);
}

void TriadPart(float* p, const float* g, float a, int64_t n) {
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has_avx2 ? TriadAvx2(p, g, a, n) : TriadBaseline(p, g, a, n);
}
#else
void TriadPart(float* p, const float* g, float a, int64_t n) { TriadBaseline(p, g, a, n); }
#endif

// p += g * a on all threads: the traffic of a parameter's update without momentum.
void Triad(at::Tensor p, const at::Tensor& g, double a) {
  if (p.scalar_type() != at::kFloat || !p.is_contiguous() || !g.is_contiguous() ||
      g.scalar_type() != at::kFloat || p.numel() != g.numel()) {
    throw std::invalid_argument("triad: p and g must be contiguous float32 of one size");
  }
  float* const to = p.mutable_data_ptr<float>();
  const float* const from = g.const_data_ptr<float>();
  at::parallel_for(0, p.numel(), 32768, [&](int64_t begin, int64_t end) {
    TriadPart(to + begin, from + begin, static_cast<float>(a), end - begin);
  });
}

// How many parts at::parallel_for really makes here; 1 would mean a build without OpenMP.
int ParallelWidth() {
  std::atomic<int> parts{0};
  at::parallel_for(0, int64_t{1} << 20, 1, [&](int64_t, int64_t) { ++parts; });
  return parts.load();
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("call", &Call);
  m.def("read", &Read);
  m.def("triad", &Triad);
  m.def("parallel_width", &ParallelWidth);
}
