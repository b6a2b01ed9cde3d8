// SPDX-License-Identifier: MIT
// The module, what it reads of Python's objects, and which engine serves a device.
#include "bindings/module.cpp"
#include "bindings/engines.cpp"
#include "bindings/python_bridge.cpp"
#include "bindings/python_objects.cpp"
