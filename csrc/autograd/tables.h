// What Python has told the extension, and what it has answered before: who computes a kind of call, and knobs as tensors.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <tuple>
#include <vector>

#include "../current_stream.h"
#include "operators.h"
#include "plain.h"

namespace dal {

// What Python knows of a loss of the table.
struct ObjectiveTraits {
  std::int64_t knobs;
  bool needs_prediction;
};

// Who computes a kind of call, or nobody here.
struct Plan {
  const Operators* operators;
  bool writes_gradient;  // in the forward
};

// Filled by Python once, and not taken down: the interpreter may be gone before.
struct Tables {
  std::vector<ObjectiveTraits> objectives;
  py::object plan;        // (backend, logits, objective) -> (name of a backend, whether it writes the gradient), or None
  py::object remember;    // (objective, numbers, logits) -> their checked tensor (K,), or None
  py::object remember_number;  // (objective, place, number, logits) -> the checked tensor () of one of them, or None
  py::object is_capturing;  // () -> whether the current CUDA stream is captured in a graph
  py::object statistics;  // (target_prob, entropy, prediction, max_prob) -> what a caller gets
  // Of Triton: (operator, *arguments) -> (results, how they are made again or None); () -> whether a launch is nobody
  // else's business; and the address of what launches, as cuLaunchKernel, or 0.
  py::object record, undisturbed;
  std::uintptr_t launcher = 0;
  // By what the answers depend on; a device is a type and an index, knobs are a stream's.
  std::map<
      std::tuple<std::string, std::int64_t, std::int64_t, std::int64_t, int, at::ScalarType, c10::DeviceType, int>, Plan>
      plans;
  std::map<std::tuple<std::int64_t, std::vector<double>, at::ScalarType, c10::DeviceType, int, void*>, Tensor> knobs;
  std::map<std::tuple<std::int64_t, Py_ssize_t, double, at::ScalarType, int, void*>, Tensor> numbers;  // on a GPU
};
inline Tables& tables() {
  static auto* made = new Tables;
  return *made;
}
// Of each memory: kinds of calls and numbers beyond this are forgotten all at once.
constexpr std::size_t kRemembered = 1024;

inline at::ScalarType loss_dtype(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The current stream where a tensor lies; null on a CPU.
inline void* stream_of(const Tensor& tensor) {
  return tensor.is_cuda() ? current_stream(tensor.device().index()) : nullptr;
}

// A plain tensor without a gradient on that device, or null. Tensors of other types may have a __torch_function__.
inline const Tensor* plain_beside(PyObject* object, const Tensor& logits) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) && tensor.device() == logits.device() && !tensor.requires_grad() ? &tensor : nullptr;
}

inline Plan plan_of(PyObject* backend, std::int64_t objective, PyObject* logits_object, const Tensor& logits) {
  const char* name = PyUnicode_Check(backend) ? PyUnicode_AsUTF8(backend) : nullptr;
  if (!name) {
    PyErr_Clear();
    return {};
  }
  auto& known = tables().plans;
  const c10::Device device = logits.device();
  // Of logits (N, C, S) it counts how many rows there are and whether their classes are neighbours.
  const bool dense = logits.dim() == 3;
  auto kind = std::make_tuple(
      std::string(name), objective, dense ? logits.size(0) * logits.size(2) : logits.size(0), logits.size(1),
      dense ? 1 + (logits.stride(1) == 1) : 0, logits.scalar_type(), device.type(), static_cast<int>(device.index()));
  const auto found = known.find(kind);
  if (found != known.end()) return found->second;
  Plan plan{};
  const py::object made = tables().plan(py::handle(backend), py::handle(logits_object), objective);
  if (!made.is_none()) {
    const auto [chosen, writes_gradient] = made.cast<std::pair<std::string, bool>>();
    plan = {&operators_of(chosen), writes_gradient};
  }
  if (known.size() >= kRemembered) known.clear();
  return known[std::move(kind)] = plan;
}

}  // namespace dal
