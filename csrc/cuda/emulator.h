// An emulator in Python, for tests on a machine without a GPU: it runs the kernels that CPU tensors ask for.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "launch.h"

namespace dal {

// What emulate() installed, or null.
Emulator* installed_emulator();

// The functions of the module: emulate() and emulates().
extern PyMethodDef emulator_methods[];

}  // namespace dal
