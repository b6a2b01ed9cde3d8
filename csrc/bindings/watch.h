// SPDX-License-Identifier: MIT
// Tells whether the Python objects that a reading came from are as they were, without reading them
// again: CPython gives a dictionary a new version number, unique in the process, at each change,
// and a class likewise. Dozens of lookups become some 30 comparisons.
//
// No references are held. An entry's object is kept alive by an entry before it (a dictionary by
// the dictionary it was found in, in the end by a root), so the comparison stops at the first
// difference.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "bindings/python_objects.h"

namespace fused_step {

// A number that is new, and unique in the process, at each change of a dictionary. 0, which stands
// for no version, where dictionaries have none (removed in Python 3.14), and in Python 3.13 for one
// whose values lie in its object: `object.name = value` leaves its version as it is.
inline uint64_t dict_version([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  const auto* const d = reinterpret_cast<PyDictObject*>(dict);
  const bool in_object = PY_VERSION_HEX >= 0x030D0000 && d->ma_values != nullptr;
  return in_object ? 0 : d->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

class Watch {
 public:
  void clear() { entries_.clear(); }

  // `object`, which is alive as long as the entries above hold, with its class and its __dict__.
  void root(PyObject* object, PyObject* dict) {
    PyTypeObject* const type = Py_TYPE(object);
    entries_.push_back({Kind::kType, object, reinterpret_cast<PyObject*>(type),
                        static_cast<uint64_t>(type->tp_version_tag)});
    entries_.push_back({Kind::kRoot, object, dict, dict_version(dict)});
  }
  // `dict` may be null or no dictionary: then the entry above it says all.
  void dict(PyObject* dict) {
    if (dict != nullptr && PyDict_Check(dict)) {
      entries_.push_back({Kind::kDict, nullptr, dict, dict_version(dict)});
    }
  }
  // A dictionary of another class, which may change without a new version.
  void unwatched(PyObject* dict) { entries_.push_back({Kind::kDict, nullptr, dict, 0}); }
  // One entry of a dictionary whose others change all the time. `value` must live as long as the
  // process: something else could come to the address of one that is gone.
  void item(PyObject* dict, PyObject* key, PyObject* value) {
    entries_.push_back({Kind::kItem, dict, value, 0, key});
  }
  // A class, which is kept alive elsewhere, with those that it inherits from.
  void type(PyTypeObject* type) {
    entries_.push_back({Kind::kClass, nullptr, reinterpret_cast<PyObject*>(type),
                        static_cast<uint64_t>(type->tp_version_tag)});
  }
  // A Python function's code, which must be kept alive.
  void code(PyObject* function) {
    entries_.push_back({Kind::kCode, function, PyFunction_GET_CODE(function), 0});
  }
  // Its arguments' defaults, kept alive by whoever took them.
  void defaults(PyObject* function) {
    entries_.push_back({Kind::kDefaults, function, PyFunction_GET_DEFAULTS(function), 0,
                        PyFunction_GET_KW_DEFAULTS(function)});
  }
  // A list and what it holds, by identity.
  void list(PyObject* list) {
    const Py_ssize_t size = PyList_GET_SIZE(list);
    entries_.push_back({Kind::kListSize, list, nullptr, static_cast<uint64_t>(size)});
    for (Py_ssize_t k = 0; k < size; ++k) {
      entries_.push_back(
          {Kind::kListItem, list, PyList_GET_ITEM(list, k), static_cast<uint64_t>(k)});
    }
  }

  // False too when nothing is watched.
  bool unchanged() const {
    for (const Entry& e : entries_) {
      if (!e.holds()) return false;
    }
    return !entries_.empty();
  }

 private:
  enum class Kind : int8_t {
    kRoot,
    kType,
    kClass,
    kDict,
    kItem,
    kCode,
    kDefaults,
    kListSize,
    kListItem
  };

  struct Entry {
    Kind kind;
    PyObject* owner;
    PyObject* object;
    uint64_t number;
    PyObject* key = nullptr;  // or what else belongs to `owner`

    bool holds() const {
      switch (kind) {
        case Kind::kDict:
          return dict_version(object) == number && number != 0;
        case Kind::kItem:
          return get_item(owner, key) == object;
        case Kind::kRoot: {
          PyObject* const dict = PyObject_GenericGetDict(owner, nullptr);
          Py_XDECREF(dict);  // the owner has a reference of its own
          return dict == object && dict_version(dict) == number && number != 0;
        }
        case Kind::kType:
          return reinterpret_cast<PyObject*>(Py_TYPE(owner)) == object &&
                 Py_TYPE(owner)->tp_version_tag == number && number != 0;
        case Kind::kClass:
          return reinterpret_cast<PyTypeObject*>(object)->tp_version_tag == number && number != 0;
        case Kind::kCode:
          return PyFunction_GET_CODE(owner) == object;
        case Kind::kDefaults:
          return PyFunction_GET_DEFAULTS(owner) == object &&
                 PyFunction_GET_KW_DEFAULTS(owner) == key;
        case Kind::kListSize:
          return PyList_GET_SIZE(owner) == static_cast<Py_ssize_t>(number);
        case Kind::kListItem:
          return PyList_GET_ITEM(owner, static_cast<Py_ssize_t>(number)) == object;
      }
      return false;
    }
  };

  std::vector<Entry> entries_;
};

}  // namespace fused_step
