// SPDX-License-Identifier: MIT
// What is said of a Python function, kept by its code. The code is kept, too, so that its address
// means nothing else later: both live as long as the process. Needs the GIL.
#pragma once

#include <Python.h>
#include <pybind11/pytypes.h>

#include <unordered_map>

namespace fused_step {

class CodeReadings {
 public:
  // What `read(function)` gives, which is called once for each code. None is not kept, and null
  // here.
  template <typename Read>
  PyObject* of(PyObject* function, const Read& read) {
    PyObject* const code = PyFunction_GET_CODE(function);
    const auto found = known_.find(code);
    if (found != known_.end()) return found->second;
    pybind11::object said = read(function);
    if (said.is_none()) return nullptr;
    const auto [place, is_new] = known_.try_emplace(code, said.ptr());
    if (is_new) {  // no other thread has been here meanwhile
      Py_INCREF(code);
      said.release();
    }
    return place->second;
  }

 private:
  std::unordered_map<PyObject*, PyObject*> known_;
};

}  // namespace fused_step
