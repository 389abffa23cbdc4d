// The knobs of a loss as one tensor beside the logits, where that takes no more than a look.
#pragma once

#include <ATen/ops/stack.h>

#include "tables.h"

namespace dal {

// A knob as a number: a float or an int, or a 0-d tensor beside logits on a CPU, whose value costs nothing to look at.
inline std::optional<double> number_of(PyObject* knob, const Tensor& logits) {
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

// Numbers are made a tensor once: to fill one costs as much as a kernel takes at classifier sizes. Once a stream, because
// another one could read what is filled on this one before it is filled.
inline std::optional<Tensor> remembered_knobs(
    std::vector<double> numbers, std::int64_t objective, PyObject* logits_object, const Tensor& logits) {
  auto& known = tables().knobs;
  const c10::Device device = logits.device();
  // A captured graph would go on reading what is forgotten here one day. The long way fills them inside of the graph.
  if (logits.is_cuda() && tables().is_capturing().cast<bool>()) return std::nullopt;
  auto key = std::make_tuple(
      objective, std::move(numbers), loss_dtype(logits), device.type(), static_cast<int>(device.index()),
      stream_of(logits));
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const py::object made =
      tables().remember(objective, py::tuple(py::cast(std::get<1>(key))), py::handle(logits_object));
  if (made.is_none()) return std::nullopt;
  if (known.size() >= kRemembered) known.clear();
  return known[std::move(key)] = THPVariable_Unpack(made.ptr());
}

// A number beside tensors, made a tensor () once a stream.
inline std::optional<Tensor> remembered_number(
    double number, std::int64_t objective, Py_ssize_t place, PyObject* logits_object, const Tensor& logits) {
  auto& known = tables().numbers;
  const auto key = std::make_tuple(
      objective, place, number, loss_dtype(logits), static_cast<int>(logits.device().index()), stream_of(logits));
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const py::object made = tables().remember_number(objective, place, number, py::handle(logits_object));
  if (made.is_none()) return std::nullopt;
  if (known.size() >= kRemembered) known.clear();
  return known[key] = THPVariable_Unpack(made.ptr());
}

// Knobs on a GPU, 0-d or one value a row, as one tensor: as they lie where they are neighbours, as those of a schedule
// are, else by a copy. Nobody looks at their values there.
inline std::optional<Tensor> joined(
    PyObject* given, std::int64_t objective, PyObject* logits_object, const Tensor& logits) {
  std::vector<Tensor> values;
  bool neighbours = true, of_rows = false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) {
    PyObject* const knob = PyTuple_GET_ITEM(given, i);
    if (const Tensor* value = plain_beside(knob, logits)) {
      if (value->scalar_type() != at::kFloat && value->scalar_type() != at::kDouble) return std::nullopt;
      const bool of_row = value->dim() == 1 && logits.dim() == 2 && value->size(0) == logits.size(0);
      if (value->dim() != 0 && !of_row) return std::nullopt;
      of_rows = of_rows || of_row;
      values.push_back(*value);
      const Tensor& first = values.front();
      neighbours = neighbours && value->dim() == 0 && value->is_alias_of(first) &&
                   value->scalar_type() == first.scalar_type() && value->storage_offset() == first.storage_offset() + i;
    } else {
      const std::optional<double> number = number_of(knob, logits);
      if (!number || tables().is_capturing().cast<bool>()) return std::nullopt;
      const std::optional<Tensor> filled = remembered_number(*number, objective, i, logits_object, logits);
      if (!filled) return std::nullopt;
      neighbours = false;
      values.push_back(*filled);
    }
  }
  const auto count = static_cast<std::int64_t>(values.size());
  if (neighbours) return values.front().as_strided({count}, {1});
  if (of_rows && count == 1) return values.front().unsqueeze(1);
  if (of_rows)
    for (Tensor& value : values) value = value.expand({logits.size(0)});
  return at::stack(values, -1);
}

// The knobs as (K,) or (N, K), or nothing where the long way must make, move or refuse them.
inline std::optional<Tensor> knobs_of(
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
    if (!number) return logits.is_cuda() ? joined(given, objective, logits_object, logits) : std::nullopt;
    numbers.push_back(*number);
  }
  return remembered_knobs(std::move(numbers), objective, logits_object, logits);
}

}  // namespace dal
