// One call from Python: arguments looked at once, the node of the autograd graph made, the loss given back.
//
// Whatever is not the common case, and whatever can be seen to be wrong before kernels run, is None: the long way in
// Python takes it, or says what is wrong.
#include <torch/csrc/Exceptions.h>

#include "function.h"
#include "knobs.h"

namespace dal {
namespace {

// Labels of CPU tensors are looked at on the way by the CPU's kernels alone.
bool has_bad_labels(const LossCall& call, const Tensor& logits) {
  if (!logits.is_cpu() || call.operators.backend == "cpu") return false;
  const Tensor outside = (call.target < 0).logical_or(call.target >= logits.size(1));
  return (call.target != call.ignore_index).logical_and(outside).any().item<bool>();
}

// Of logits (N, C, d1, ...) one value a label.
bool fits(const Tensor& target, const Tensor& logits) {
  if (target.dim() != logits.dim() - 1 || target.size(0) != logits.size(0)) return false;
  for (std::int64_t d = 2; d < logits.dim(); ++d)
    if (target.size(d - 1) != logits.size(d)) return false;
  return true;
}

// What the loss and the statistics of rows are given back as: of more than two dimensions in the shape of the labels.
Tensor shaped_as(const Tensor& rows, const Tensor& target) {
  return target.dim() == 1 ? rows : rows.reshape(target.sizes());
}

PyObject* with_statistics(const Tensor& loss, const Tensor& fields, const Tensor& prediction, const Tensor& target) {
  const auto wrapped = [](const Tensor& tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)); };
  const auto field = [&](Field which) { return wrapped(shaped_as(fields.select(0, which), target)); };
  const py::object stats =
      tables().statistics(field(kTargetProb), field(kEntropy), wrapped(shaped_as(prediction, target)), field(kMaxProb));
  return py::make_tuple(wrapped(loss), stats).release().ptr();
}

// Of (numbers, every, q_end, max_weight), where the operator takes such labels.
std::optional<Hearer> hearer_of(PyObject* given, const Tensor& logits, const Tensor& target) {
  if (!PyTuple_Check(given) || PyTuple_GET_SIZE(given) != 4) return std::nullopt;
  const Tensor* numbers = plain_beside(PyTuple_GET_ITEM(given, 0), logits);
  if (!numbers || !target.is_contiguous()) return std::nullopt;
  return Hearer{
      *numbers, PyLong_AsLongLong(PyTuple_GET_ITEM(given, 1)), PyFloat_AsDouble(PyTuple_GET_ITEM(given, 2)),
      PyFloat_AsDouble(PyTuple_GET_ITEM(given, 3))};
}

enum Argument {
  kObjective, kKnobs, kInput, kTarget, kWeight, kIgnoreIndex, kReduction, kReturnStats, kSampleWeight, kBackend, kHearer,
  kArguments
};

// loss(objective, knobs, input, target, weight, ignore_index, reduction, return_stats, sample_weight, backend, hearer):
// as dal_kernels.functional.loss_of, or None.
PyObject* loss(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == kArguments, "loss takes ", +kArguments, " arguments, got ", count);
  PyObject* const input = given[kInput];
  if (!THPVariable_CheckExact(input) || given[kSampleWeight] != Py_None || is_watched()) Py_RETURN_NONE;
  const Tensor& given_logits = THPVariable_Unpack(input);
  if (!is_plain(given_logits) || given_logits.dim() < 2 || given_logits.size(1) == 0) Py_RETURN_NONE;
  const bool dense = given_logits.dim() > 2;
  // As operators take them, who read them where they lie.
  const Tensor logits = dense ? given_logits.flatten(2) : given_logits;
  const auto held = py::reinterpret_steal<py::object>(dense ? THPVariable_Wrap(logits) : Py_NewRef(input));
  PyObject* const logits_object = held.ptr();
  const at::ScalarType dtype = logits.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf && dtype != at::kDouble) Py_RETURN_NONE;
  const Tensor* labels = plain_beside(given[kTarget], logits);
  // Numbers of 64 bits without a sign may lie beyond int64, which the long way looks at.
  if (!labels || !at::isIntegralType(labels->scalar_type(), false) || labels->scalar_type() == at::kUInt64 ||
      !fits(*labels, given_logits))
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
  const Plan plan = plan_of(given[kBackend], objective, logits_object, logits);
  if (!plan.operators) Py_RETURN_NONE;
  const std::optional<Tensor> knobs = knobs_of(given[kKnobs], objective, logits_object, logits);
  if (!knobs) Py_RETURN_NONE;

  Tensor target = dense ? labels->reshape(-1) : *labels;
  if (target.scalar_type() != at::kLong) target = target.to(at::kLong);
  const bool want_gradient = logits.requires_grad() && at::GradMode::is_enabled();
  const int want_stats = PyObject_IsTrue(given[kReturnStats]);
  if (want_stats < 0) return nullptr;
  const std::optional<Hearer> hearer =
      want_stats ? hearer_of(given[kHearer], logits, target) : std::nullopt;
  LossCall call{
      *plan.operators, target, *knobs, weight ? std::optional(*weight) : std::nullopt, objective, ignore_index,
      reduction, want_gradient && reduction != kNone && dtype != at::kHalf && plan.writes_gradient,
      want_stats == 1, want_stats && !hearer, want_stats || tables().objectives.at(objective).needs_prediction,
      hearer ? &*hearer : nullptr, {}, {}};
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
    if (!logits.is_cpu() || PyErr_Occurred()) throw;
    // A label that is none: the long way finds it again and says where it stands.
    value = Tensor();
  }
  if (!value.defined()) Py_RETURN_NONE;
  if (reduction == kNone) value = shaped_as(value, *labels);
  if (!want_stats || hearer) return THPVariable_Wrap(value);
  return with_statistics(value, call.fields, call.prediction, *labels);
  END_HANDLE_TH_ERRORS
}

// learn(objectives, plan, remember, remember_number, is_capturing, statistics): what Tables has of Python, objectives
// as (knobs, needs_prediction) each.
PyObject* learn(PyObject*, PyObject* given) {
  HANDLE_TH_ERRORS
  const auto arguments = py::reinterpret_borrow<py::tuple>(given);
  TORCH_CHECK(arguments.size() == 6, "learn takes 6 arguments, got ", arguments.size());
  Tables& known = tables();
  known.objectives.clear();
  for (const py::handle traits : arguments[0]) {
    const auto [knobs, needs_prediction] = traits.cast<std::pair<std::int64_t, bool>>();
    known.objectives.push_back({knobs, needs_prediction});
  }
  known.plan = arguments[1];
  known.remember = arguments[2];
  known.remember_number = arguments[3];
  known.is_capturing = arguments[4];
  known.statistics = arguments[5];
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// learn_triton(record, undisturbed, launcher): the same of Triton. A launcher of 0: its operators stay Python's.
PyObject* learn_triton(PyObject*, PyObject* given) {
  HANDLE_TH_ERRORS
  const auto arguments = py::reinterpret_borrow<py::tuple>(given);
  TORCH_CHECK(arguments.size() == 3, "learn_triton takes 3 arguments, got ", arguments.size());
  tables().record = arguments[0];
  tables().undisturbed = arguments[1];
  tables().launcher = arguments[2].cast<std::uintptr_t>();
  forget_records();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&loss)), METH_FASTCALL, nullptr},
    {"learn", &learn, METH_VARARGS, nullptr},
    {"learn_triton", &learn_triton, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace dal

PyMODINIT_FUNC PyInit__node(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_node", "The autograd node of dal_kernels.", -1, dal::methods, nullptr, nullptr, nullptr,
      nullptr};
  return PyModule_Create(&definition);
}
