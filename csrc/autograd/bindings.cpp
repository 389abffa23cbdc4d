// One call from Python: arguments looked at once, the node of the autograd graph made, the loss given back.
//
// Whatever is not the common case, and whatever is wrong, is None: the long way in Python takes it, or says what is
// wrong. So there is one place for errors.
#include <ATen/ops/stack.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <tuple>
#include <vector>

#include "function.h"

namespace dal {
namespace {

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
  py::object is_capturing;  // () -> whether the current CUDA stream is captured in a graph
  py::object statistics;  // (target_prob, entropy, prediction, max_prob) -> what a caller gets
  // Both by what the answers depend on; a device is a type and an index.
  std::map<std::tuple<std::string, std::int64_t, std::int64_t, std::int64_t, at::ScalarType, c10::DeviceType, int>, Plan>
      plans;
  std::map<std::tuple<std::int64_t, std::vector<double>, at::ScalarType, c10::DeviceType, int>, Tensor> knobs;
};
Tables& tables() {
  static auto* made = new Tables;
  return *made;
}
// Of either memory: kinds of calls and numbers beyond this are forgotten all at once.
constexpr std::size_t kRemembered = 1024;

at::ScalarType loss_dtype(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A plain tensor without a gradient on that device, or null. Tensors of other types may have a __torch_function__.
const Tensor* plain_beside(PyObject* object, const Tensor& logits) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) && tensor.device() == logits.device() && !tensor.requires_grad() ? &tensor : nullptr;
}

Plan plan_of(PyObject* backend, std::int64_t objective, PyObject* logits_object, const Tensor& logits) {
  const char* name = PyUnicode_Check(backend) ? PyUnicode_AsUTF8(backend) : nullptr;
  if (!name) {
    PyErr_Clear();
    return {};
  }
  auto& known = tables().plans;
  const c10::Device device = logits.device();
  auto kind = std::make_tuple(
      std::string(name), objective, logits.size(0), logits.size(1), logits.scalar_type(), device.type(),
      static_cast<int>(device.index()));
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

// A knob as a number: a float or an int, or a 0-d tensor beside logits on a CPU, whose value costs nothing to look at.
std::optional<double> number_of(PyObject* knob, const Tensor& logits) {
  double value = 0;
  if (PyFloat_CheckExact(knob) || PyLong_CheckExact(knob)) {
    value = PyFloat_AsDouble(knob);
  } else {
    const Tensor* tensor = logits.is_cpu() ? plain_beside(knob, logits) : nullptr;
    if (!tensor || tensor->dim() != 0) return std::nullopt;
    if (tensor->scalar_type() == at::kFloat) value = *tensor->const_data_ptr<float>();
    else if (tensor->scalar_type() == at::kDouble) value = *tensor->const_data_ptr<double>();
    else return std::nullopt;
    // As the kernels will read it: a float64 q may be 0 in float32.
    if (loss_dtype(logits) == at::kFloat) value = static_cast<float>(value);
  }
  // A NaN is equal to nothing, and wrong; of an overflow Python says what is accepted.
  if (PyErr_Occurred() || value != value) {
    PyErr_Clear();
    return std::nullopt;
  }
  return value;
}

// Numbers are made a tensor once: to fill one costs as much as a kernel takes at classifier sizes.
std::optional<Tensor> remembered_knobs(
    std::vector<double> numbers, std::int64_t objective, PyObject* logits_object, const Tensor& logits) {
  auto& known = tables().knobs;
  const c10::Device device = logits.device();
  // A captured graph would go on reading what is forgotten here one day. The long way fills them inside of the graph.
  if (logits.is_cuda() && tables().is_capturing().cast<bool>()) return std::nullopt;
  auto key = std::make_tuple(
      objective, std::move(numbers), loss_dtype(logits), device.type(), static_cast<int>(device.index()));
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const py::object made =
      tables().remember(objective, py::tuple(py::cast(std::get<1>(key))), py::handle(logits_object));
  if (made.is_none()) return std::nullopt;
  if (known.size() >= kRemembered) known.clear();
  return known[std::move(key)] = THPVariable_Unpack(made.ptr());
}

// 0-d tensors on a GPU as one: as they lie where they are neighbours, as those of a schedule are, else by a copy.
std::optional<Tensor> joined(PyObject* given, const Tensor& logits) {
  std::vector<Tensor> values;
  bool neighbours = true;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) {
    const Tensor* value = plain_beside(PyTuple_GET_ITEM(given, i), logits);
    if (!value || value->dim() != 0 || (value->scalar_type() != at::kFloat && value->scalar_type() != at::kDouble))
      return std::nullopt;
    values.push_back(*value);
    const Tensor& first = values.front();
    neighbours = neighbours && value->is_alias_of(first) && value->scalar_type() == first.scalar_type() &&
                 value->storage_offset() == first.storage_offset() + i;
  }
  const auto count = static_cast<std::int64_t>(values.size());
  return neighbours ? values.front().as_strided({count}, {1}) : at::stack(values, -1);
}

// The knobs as (K,), or nothing where the long way must make, move or refuse them.
std::optional<Tensor> knobs_of(
    PyObject* given, std::int64_t objective, PyObject* logits_object, const Tensor& logits) {
  const auto count = tables().objectives.at(objective).knobs;
  if (!PyTuple_CheckExact(given)) {
    const Tensor* tensor = plain_beside(given, logits);
    return tensor && tensor->dim() == 1 && tensor->size(0) == count ? std::optional(*tensor) : std::nullopt;
  }
  if (PyTuple_GET_SIZE(given) != count) return std::nullopt;
  std::vector<double> numbers;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const std::optional<double> number = number_of(PyTuple_GET_ITEM(given, i), logits);
    if (!number) return i == 0 ? joined(given, logits) : std::nullopt;
    numbers.push_back(*number);
  }
  return remembered_knobs(std::move(numbers), objective, logits_object, logits);
}

// Labels of CPU tensors are looked at on the way by the CPU's kernels alone.
bool has_bad_labels(const LossCall& call, const Tensor& logits) {
  if (!logits.is_cpu() || call.operators.backend == "cpu") return false;
  const Tensor outside = (call.target < 0).logical_or(call.target >= logits.size(1));
  return (call.target != call.ignore_index).logical_and(outside).any().item<bool>();
}

PyObject* with_statistics(const Tensor& loss, const Tensor& fields, const Tensor& prediction) {
  const auto field = [&](Field which) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(fields.select(0, which))); };
  const py::object stats = tables().statistics(
      field(kTargetProb), field(kEntropy), py::reinterpret_steal<py::object>(THPVariable_Wrap(prediction)),
      field(kMaxProb));
  return py::make_tuple(py::reinterpret_steal<py::object>(THPVariable_Wrap(loss)), stats).release().ptr();
}

enum Argument {
  kObjective, kKnobs, kInput, kTarget, kWeight, kIgnoreIndex, kReduction, kReturnStats, kSampleWeight, kBackend,
  kArguments
};

// loss(objective, knobs, input, target, weight, ignore_index, reduction, return_stats, sample_weight, backend): as
// dal_kernels.functional.loss_of, or None.
PyObject* loss(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == kArguments, "loss takes ", +kArguments, " arguments, got ", count);
  PyObject* const input = given[kInput];
  if (!THPVariable_CheckExact(input) || given[kSampleWeight] != Py_None || is_watched()) Py_RETURN_NONE;
  const Tensor& logits = THPVariable_Unpack(input);
  if (!is_plain(logits) || logits.dim() != 2 || logits.size(1) == 0) Py_RETURN_NONE;
  const at::ScalarType dtype = logits.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf && dtype != at::kDouble) Py_RETURN_NONE;
  const Tensor* target = plain_beside(given[kTarget], logits);
  if (!target || target->scalar_type() != at::kLong || target->dim() != 1 || target->size(0) != logits.size(0))
    Py_RETURN_NONE;
  const Tensor* weight = nullptr;
  if (given[kWeight] != Py_None) {
    weight = plain_beside(given[kWeight], logits);
    if (!weight || weight->dim() != 1 || weight->size(0) != logits.size(1) ||
        weight->scalar_type() != loss_dtype(logits))
      Py_RETURN_NONE;
  }
  if (!PyLong_CheckExact(given[kIgnoreIndex]) || !PyUnicode_Check(given[kReduction])) Py_RETURN_NONE;
  int beyond = 0;
  const std::int64_t ignore_index = PyLong_AsLongLongAndOverflow(given[kIgnoreIndex], &beyond);
  std::int64_t reduction = -1;
  for (const auto& [name, value] : {std::pair{"none", kNone}, {"mean", kMean}, {"sum", kSum}})
    if (PyUnicode_CompareWithASCIIString(given[kReduction], name) == 0) reduction = value;
  if (beyond || reduction < 0) Py_RETURN_NONE;
  const std::int64_t objective = PyLong_AsLongLong(given[kObjective]);
  const Plan plan = plan_of(given[kBackend], objective, input, logits);
  if (!plan.operators) Py_RETURN_NONE;
  const std::optional<Tensor> knobs = knobs_of(given[kKnobs], objective, input, logits);
  if (!knobs) Py_RETURN_NONE;

  const bool want_gradient = logits.requires_grad() && at::GradMode::is_enabled();
  const bool want_stats = PyObject_IsTrue(given[kReturnStats]);
  LossCall call{
      *plan.operators, *target, *knobs, weight ? std::optional(*weight) : std::nullopt, objective, ignore_index,
      reduction, want_gradient && reduction != kNone && dtype != at::kHalf && plan.writes_gradient,
      want_stats, want_stats || tables().objectives.at(objective).needs_prediction, {}, {}};
  Tensor value;
  try {
    const py::gil_scoped_release released;
    if (has_bad_labels(call, logits)) {
      // None, below.
    } else if (want_gradient) {
      const Tensor anchor = anchor_of(logits);
      value = FusedLoss::apply(logits, &call, &anchor);
    } else {
      Values made = call.run(logits, false, want_stats);
      value = made[0].toTensor();
      if (want_stats) std::tie(call.fields, call.prediction) = std::pair(made[2].toTensor(), made[3].toTensor());
    }
  } catch (const python_error&) {
    throw;
  } catch (const std::exception&) {
    if (!logits.is_cpu()) throw;
    // A label that is none: the long way finds it again and says where it stands.
  }
  if (!value.defined()) Py_RETURN_NONE;
  return want_stats ? with_statistics(value, call.fields, call.prediction) : THPVariable_Wrap(value);
  END_HANDLE_TH_ERRORS
}

// see(backend, numbers, stats, target, every, q_end, max_weight) -> whether it was done: the operator of that backend,
// for labels as the operator takes them.
PyObject* see(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 7, "see takes 7 arguments, got ", count);
  if (!THPVariable_CheckExact(given[1]) || is_watched()) Py_RETURN_FALSE;
  const Tensor& numbers = THPVariable_Unpack(given[1]);
  if (!is_plain(numbers)) Py_RETURN_FALSE;
  PyObject* const stats = given[2];  // a RowStats
  const Tensor* target_prob = plain_beside(PyTuple_GET_ITEM(stats, 0), numbers);
  const Tensor* prediction = plain_beside(PyTuple_GET_ITEM(stats, 2), numbers);
  const Tensor* max_prob = plain_beside(PyTuple_GET_ITEM(stats, 3), numbers);
  const Tensor* target = plain_beside(given[3], numbers);
  if (!target_prob || !prediction || !max_prob || !target || target->scalar_type() != at::kLong ||
      target->sizes() != prediction->sizes())
    Py_RETURN_FALSE;
  for (const Tensor* rows : {target_prob, prediction, max_prob, target})
    if (!rows->is_contiguous()) Py_RETURN_FALSE;
  Values values{numbers, *max_prob, *target_prob, *prediction, *target, static_cast<std::int64_t>(PyLong_AsLongLong(given[4])),
                PyFloat_AsDouble(given[5]), PyFloat_AsDouble(given[6])};
  const Operators& operators = operators_of(std::string(PyUnicode_AsUTF8(given[0])));
  const py::gil_scoped_release released;
  called(operators.see, std::move(values));
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// learn(objectives, plan, remember, is_capturing, statistics): what Tables has of Python, objectives as (knobs, needs_prediction) each.
PyObject* learn(PyObject*, PyObject* given) {
  HANDLE_TH_ERRORS
  const auto arguments = py::reinterpret_borrow<py::tuple>(given);
  TORCH_CHECK(arguments.size() == 5, "learn takes 5 arguments, got ", arguments.size());
  Tables& known = tables();
  known.objectives.clear();
  for (const py::handle traits : arguments[0]) {
    const auto [knobs, needs_prediction] = traits.cast<std::pair<std::int64_t, bool>>();
    known.objectives.push_back({knobs, needs_prediction});
  }
  known.plan = arguments[1];
  known.remember = arguments[2];
  known.is_capturing = arguments[3];
  known.statistics = arguments[4];
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&loss)), METH_FASTCALL, nullptr},
    {"see", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&see)), METH_FASTCALL, nullptr},
    {"learn", &learn, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace dal

PyMODINIT_FUNC PyInit__node(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_node", "The autograd node of dal_kernels.", -1, dal::methods, nullptr, nullptr, nullptr,
      nullptr};
  return PyModule_Create(&definition);
}
