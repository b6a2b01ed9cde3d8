// SPDX-License-Identifier: MIT
// The Python module fused_step._C: what it offers, and nothing of how it is done.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "bindings/engines.h"
#include "bindings/head_step.h"
#include "bindings/linear_mse_bfloat16.h"
#include "bindings/linear_mse_eager.h"
#include "bindings/linear_step.h"
#include "bindings/python_bridge.h"
#include "bindings/python_objects.h"
#include "bindings/sgd_groups.h"
#include "bindings/sgd_step.h"
#include "cpu/kernels.h"
#ifdef FUSED_STEP_WITH_CUDA
#include "bindings/cuda_support.h"
#include "bindings/linear_mse_sgd_cuda.h"
#endif

namespace fused_step {
namespace {

namespace py = pybind11;

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

std::vector<std::string> isa_levels(bool supported_only) {
  std::vector<std::string> names;
  for (int k = 0; k < cpu::kIsaCount; ++k) {
    const auto isa = static_cast<cpu::Isa>(k);
    if (!supported_only || cpu::isa_supported(isa)) names.emplace_back(cpu::isa_name(isa));
  }
  return names;
}

void use_isa(const std::string& name) {
  for (int k = 0; k < cpu::kIsaCount; ++k) {
    const auto isa = static_cast<cpu::Isa>(k);
    if (name == cpu::isa_name(isa) && cpu::use_isa(isa)) return;
  }
  throw py::value_error("use_isa: expected an instruction set of this processor, got " + name);
}

}  // namespace
}  // namespace fused_step

#ifdef __clang__
#define FUSED_STEP_COMPILER __VERSION__
#else
#define FUSED_STEP_COMPILER "GCC " __VERSION__
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using fused_step::HeadStep;
  using fused_step::LinearStep;
  using fused_step::SgdStep;
  fused_step::python_objects();

  m.attr("compiler") = FUSED_STEP_COMPILER;
  m.def("parallel_width", &fused_step::parallel_width,
        "Number of distinct threads that at::parallel_for uses in this extension.",
        py::call_guard<py::gil_scoped_release>());
  m.def("isa_levels", &fused_step::isa_levels, py::arg("supported_only") = false,
        "Instruction sets that loops were compiled for, or those this processor has.");
  m.def(
      "isa_used", [] { return fused_step::cpu::isa_name(fused_step::cpu::isa_used()); },
      "The instruction set in use.");
  m.def("use_isa", &fused_step::use_isa, py::arg("name"),
        "Uses another instruction set from now on; for tests.");
  m.def("has_bfloat16_gemm", &fused_step::has_bfloat16_gemm,
        "Whether the processor multiplies bfloat16, and torch uses that.");
  m.def("use_bfloat16_gemm", &fused_step::use_bfloat16_gemm, py::arg("always"),
        "GEMMs of bfloat16 are in bfloat16 always, never or (None) where faster; for tests.");

#ifdef FUSED_STEP_WITH_CUDA
  m.def("cuda_archs", &fused_step::cuda_archs, "What the CUDA kernels were compiled for.");
  m.def(
      "use_cuda_plan", &fused_step::use_cuda_plan, py::arg("name"),
      "On CUDA the plan of every step that it serves or (None) the one that is expected to be the "
      "fastest; for tests and benchmarks.");
#endif
  m.def("serves", &fused_step::is_served, py::arg("device"),
        "Whether kernels of this build run on a torch.device.");

  m.def(
      "is_left_to_autocast",
      [](const at::Tensor& input, const at::Tensor& weight) {
        if (weight.dim() != 2 || weight.numel() == 0) return false;
        const int64_t O = weight.size(0), I = weight.size(1);
        return fused_step::is_left_to_autocast(weight.device(), {input.numel() / I, I, O},
                                               input.scalar_type(), /*whole_step=*/false);
      },
      py::arg("input"), py::arg("weight"),
      "Whether under autocast torch's own operators are the faster ones for loss and gradients.");
  m.attr("linear_mse_loss") = fused_step::linear_mse_loss_function();
  m.def(
      "set_linear_mse_loss",
      [](const py::type& type) { fused_step::set_linear_mse_loss(type.ptr()); }, py::arg("type"),
      "Makes the class known that LinearStep takes with a loss of None.");

  m.def(
      "set_sgd", [](const py::type& type) { fused_step::set_sgd(type.ptr()); }, py::arg("type"),
      "Makes fused_step.SGD known to LinearStep.");

  m.def(
      "sgd_options_are_fused",
      [](py::handle optimizer) { return fused_step::sgd_options_are_fused(optimizer.ptr()); },
      py::arg("optimizer"), "Whether the options of all of an SGD's groups are for the kernels.");

  m.def(
      "operators_are_watched",
      [] { return !fused_step::operators_are_plain() || fused_step::is_observed(); },
      "Whether a mode, a transform or a profiler looks at PyTorch's operators.");

  py::class_<LinearStep>(m, "LinearStep", py::module_local(),
                         "Fused plans of TrainStep for a linear model; see train_step.py.")
      .def(py::init<py::handle, py::handle, py::handle>(), py::arg("model"),
           py::arg("loss_function"), py::arg("optimizer"))
      .def_property_readonly("step",
                             [](const py::object& self) {
                               return fused_step::step_function(self.cast<LinearStep&>(), self);
                             })
      .def("run", &LinearStep::run, py::arg("inputs"), py::arg("targets"), py::arg("epochs"),
           py::arg("batch_size"), py::arg("shuffle"), py::arg("generator"), py::arg("progress"))
      .def("explain", &LinearStep::explain, py::arg("input"), py::arg("target"))
      .def_property_readonly("plan", &LinearStep::plan);

  py::class_<HeadStep>(m, "HeadStep", py::module_local(),
                       "Plan head of TrainStep, for a model that ends in a linear layer; see "
                       "train_step.py.")
      .def(py::init<py::handle, py::handle, py::handle>(), py::arg("model"),
           py::arg("loss_function"), py::arg("optimizer"))
      .def("parts", &HeadStep::parts)
      .def("confirms", &HeadStep::confirms, py::arg("number"))
      .def("step", &HeadStep::step, py::arg("hidden"), py::arg("target"))
      .def("loss", &HeadStep::loss, py::arg("hidden"), py::arg("target"))
      .def("explain", &HeadStep::explain, py::arg("input"), py::arg("target"));

  py::class_<SgdStep>(m, "SgdStep", py::module_local(),
                      "The update of fused_step.SGD; see optim.py.")
      .def(py::init<>())
      .def_property_readonly("step",
                             [](const py::object& self) {
                               return fused_step::sgd_step_function(self.cast<SgdStep&>(), self);
                             })
      .def(
          "update",
          [](SgdStep& step, py::handle optimizer, const py::object& update_left) {
            return step.update(optimizer.ptr(), update_left);
          },
          py::arg("optimizer"), py::arg("update_left"));
}
