// SPDX-License-Identifier: MIT
// Door 1 for a linear model: finds out at each call whether the five lines may be fused, and does
// them.
#pragma once

#include <Python.h>
#include <pybind11/pytypes.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "bindings/engines.h"
#include "bindings/flattening.h"
#include "bindings/linear_mse_sgd.h"
#include "bindings/sgd_groups.h"
#include "bindings/squared_error.h"
#include "bindings/verdict.h"
#include "bindings/watch.h"
#include "bindings/world.h"

namespace fused_step {

// A call while another is under way is one where no fused plan applies. Holds no references to what
// it was made of: the TrainStep that made it does, where Python's garbage collector sees them (a
// model may well hold its TrainStep).
class LinearStep {
 public:
  LinearStep(pybind11::handle model, pybind11::handle loss_function, pybind11::handle optimizer)
      : model_(model), loss_function_(loss_function), optimizer_(optimizer) {}

  // One step; None, and nothing changed, where no fused plan applies. Python calls it through
  // step_function().
  pybind11::object step(pybind11::handle input, pybind11::handle target);

  // Many steps; None, and nothing changed, where no fused plan applies. `progress(steps_done)` is
  // called about ten times a second if it is not None.
  pybind11::object run(pybind11::handle inputs, pybind11::handle targets, int64_t epochs,
                       int64_t batch_size, bool shuffle, std::optional<at::Generator> generator,
                       const pybind11::object& progress);

  // The plan that step(input, target) would take, and why no deeper one.
  std::pair<std::string, std::vector<std::string>> explain(pybind11::handle input,
                                                           pybind11::handle target);

  // The plan of the last call of step or run; null where none applied.
  const char* plan() const;

 private:
  // What the model, the loss and the optimizer say: good for as long as none of them changes.
  struct Reading {
    SgdReading sgd;
    Flattening flattening = Flattening::kNone;
    SquaredError error;
  };

  // Everything a step needs.
  struct Call {
    Reading reading;
    LinearSgdState state;
    bool autocast = false;  // is on for the weight's device
    at::Tensor input;
    at::Tensor target;                   // [*, O], also where the model flattens
    std::vector<NewBuffer> new_buffers;  // of a first step

    Call() = default;
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() { give_back(/*as_own=*/false); }

    // Puts the tensor of `object` into `tensor`, an undefined one of this Call, and keeps `object`
    // alive instead: a reference of C++ to a tensor comes back to its object, and takes the GIL for
    // it, which for the four of a small step is a tenth of its instructions.
    void borrow(at::Tensor& tensor, PyObject* object);
    // Makes them references of C++, before the GIL is given away: another thread may then give the
    // objects other tensors.
    void own() { give_back(/*as_own=*/true); }

   private:
    struct Loan {
      at::Tensor* tensor;
      PyObject* object;
    };

    void give_back(bool as_own);

    std::array<Loan, 6> loans_;  // of weight and bias, their buffers, input and target
    size_t loan_count_ = 0;
  };

  // Another thread may come while a step has given the GIL away, or a signal's handler in a run.
  struct InUse {
    explicit InUse(LinearStep& step) : step(step) { step.busy_ = true; }
    ~InUse() { step.busy_ = false; }
    LinearStep& step;
  };

  bool resolve(PyObject* input, PyObject* target, Verdict& verdict, Call& call);
  bool read_objects(Verdict& verdict, Reading& reading);
  static bool check_params(const Autocast& autocast, Verdict& verdict, Call& call);
  static bool check_batch(PyObject* input, PyObject* target, Verdict& verdict, Call& call);
  // Whether a fused plan is worth taking for batches of so many rows.
  static bool check_rows(const Call& call, int64_t rows, Verdict& verdict);
  static void make_buffers(Call& call);
  static void leave_optimizer(Call& call);

  pybind11::handle model_, loss_function_, optimizer_;
  SgdReader sgd_reader_;
  Watch watch_;  // over what kept_ came from
  Reading kept_;
  EngineMemory memory_;
  const char* plan_ = nullptr;
  bool busy_ = false;
};

// `step`.step, kept alive by its Python object `self`, as a built-in function of two positional
// arguments: for a small step the dispatch of a pybind11 method is a good part of the time.
pybind11::object step_function(LinearStep& step, const pybind11::object& self);

}  // namespace fused_step
