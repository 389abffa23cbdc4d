#include "emulator.h"

#include <stdexcept>
#include <string>

namespace dal {
namespace {

struct Hold {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Hold() { PyGILState_Release(state); }
};

std::string python_error() {
  PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  std::string text = "the emulator failed";
  if (PyObject* repr = value ? PyObject_Repr(value) : nullptr) {
    if (const char* utf8 = PyUnicode_AsUTF8AndSize(repr, nullptr)) text += std::string(": ") + utf8;
    Py_DECREF(repr);
  }
  Py_XDECREF(type), Py_XDECREF(value), Py_XDECREF(trace);
  return text;
}

// Called with (kernel, (x, y), threads, shared, arguments, [(buffer, address, bytes)]).
struct PythonEmulator : Emulator {
  PyObject* callable;
  PythonEmulator(PyObject* callable, Device device) : callable(callable) {
    this->device = device;
    Py_INCREF(callable);
  }
  ~PythonEmulator() override { Py_DECREF(callable); }
  void run(const char* kernel, const Grid& grid, const void* arguments, std::size_t bytes,
           const std::vector<Buffer>& buffers) override {
    const Hold hold;
    PyObject* list = PyList_New(0);
    for (const Buffer& buffer : buffers) {
      PyObject* item = Py_BuildValue("(sKn)", buffer.name, static_cast<unsigned long long>(buffer.address),
                                     static_cast<Py_ssize_t>(buffer.bytes));
      PyList_Append(list, item);
      Py_DECREF(item);
    }
    PyObject* result = PyObject_CallFunction(
        callable, "s(LL)iiy#N", kernel, static_cast<long long>(grid.x), static_cast<long long>(grid.y), grid.threads,
        grid.shared, static_cast<const char*>(arguments), static_cast<Py_ssize_t>(bytes), list);
    if (!result) throw std::runtime_error(python_error());
    Py_DECREF(result);
  }
};
PythonEmulator* emulator = nullptr;  // never freed at exit: Python may be gone by then

// emulate(callable, capability, multiprocessors): runs CPU tensors through it from now on; emulate(None): no more.
PyObject* emulate(PyObject*, PyObject* arguments) {
  PyObject* callable = nullptr;
  Device device{90, 132};
  if (!PyArg_ParseTuple(arguments, "O|ii", &callable, &device.capability, &device.multiprocessors)) return nullptr;
  delete emulator;
  emulator = callable == Py_None ? nullptr : new PythonEmulator(callable, device);
  Py_RETURN_NONE;
}

PyObject* emulates(PyObject*, PyObject*) { return PyBool_FromLong(emulator != nullptr); }

}  // namespace

Emulator* installed_emulator() { return emulator; }

PyMethodDef emulator_methods[] = {
    {"emulate", emulate, METH_VARARGS,
     "emulate(callable, capability=90, multiprocessors=132): run kernels for CPU tensors through callable(kernel, "
     "grid, threads, shared, arguments, buffers); emulate(None) ends that."},
    {"emulates", emulates, METH_NOARGS, "Whether an emulator is installed."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace dal
