// SPDX-License-Identifier: MIT
// The Python module fused_step._C: what it offers, and nothing of how it is done.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <thread>

namespace fused_step {
namespace {

// Number of distinct threads that run at::parallel_for's chunks. Counted, not asked for: built
// without -fopenmp it is 1 whatever at::get_num_threads() says.
int64_t parallel_width() {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  return static_cast<int64_t>(threads.size());
}

}  // namespace
}  // namespace fused_step

#ifdef __clang__
#define FUSED_STEP_COMPILER __VERSION__
#else
#define FUSED_STEP_COMPILER "GCC " __VERSION__
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("compiler") = FUSED_STEP_COMPILER;
  m.def("parallel_width", &fused_step::parallel_width,
        "Number of distinct threads that at::parallel_for uses in this extension.",
        pybind11::call_guard<pybind11::gil_scoped_release>());
}
