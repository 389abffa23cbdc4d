// The CUDA operators, on the LibTorch stable ABI. Nothing here waits for the device.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <torch/csrc/stable/accelerator.h>

#include <memory>
#include <string>
#include <tuple>

#include "../tensors.h"
#include "arguments.h"
#include "launch.h"

namespace dal {
namespace {

// ---- an emulator in Python: called with (kernel, (x, y), threads, shared, arguments, [(buffer, address, bytes)])

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

Launcher launcher_for(const Place& place) {
  if (place.type == aoti_torch_device_type_cuda()) return Launcher(place.index, nullptr);
  require(emulator != nullptr, "backend 'cuda' takes CUDA tensors, got tensors on the CPU");
  return Launcher(-1, emulator);
}

// Kernels start on the current device, which need not be the tensors'.
std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_of(const Place& place) {
  if (place.type != aoti_torch_device_type_cuda()) return nullptr;
  return std::make_unique<torch::stable::accelerator::DeviceGuard>(place.index);
}

// A tensor that a kernel will touch: it must be where the logits are.
struct Touched {
  Launcher& launcher;
  Place place;
  void operator()(const char* name, const Tensor& tensor, std::size_t itemsize) const {
    if (tensor.numel() == 0) return;
    const Place here = Place::of(tensor);
    if (here.type != place.type || here.index != place.index)
      throw std::invalid_argument(std::string(name) + " must be on the device of logits");
    std::int64_t last = 0;
    for (std::int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    launcher.allow({name, reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()),
                    (static_cast<std::size_t>(last) + 1) * itemsize});
  }
};

// ---- the operators

std::size_t knob_size(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? 8 : 4;
}

bool is_aligned(const void* data, std::int64_t stride_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

struct Outputs {
  Tensor loss, gradient, fields, prediction, correction;
};

Outputs run_loss(
    const Tensor& given, const Tensor& target, const Tensor& q, const Tensor& bootstrap_weight,
    const std::optional<Tensor>& weight, std::int64_t ignore_index, std::int64_t reduction, bool hard,
    bool want_gradient, bool want_prediction, bool want_fields) {
  const Tensor logits = with_unit_class_stride(given);
  const Place place = Place::of(logits);
  const auto guard = guard_of(place);
  Launcher launcher = launcher_for(place);
  return dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    Forward<S> args{};
    args.batch = forward_batch<S>(logits, target, q, bootstrap_weight, weight, ignore_index, reduction, hard);
    args.reduction = static_cast<Reduction>(reduction);
    const std::int64_t rows = args.batch.logits.rows, classes = args.batch.logits.classes;
    require(classes < std::int64_t(1) << 27, "logits must have fewer than 2^27 classes");
    const bool reduced = args.reduction != kNone;
    const std::int32_t dtype = dtype_code<A>();
    Outputs out{
        reduced ? empty<0>({}, dtype, place) : empty<1>({rows}, dtype, place),
        want_gradient ? empty<2>({rows, classes}, dtype_of(logits), place) : empty<1>({0}, dtype_of(logits), place),
        want_fields ? empty<2>({want_prediction ? std::int64_t(kFields) : kGradientFields, rows}, dtype, place)
                    : empty<1>({0}, dtype, place),
        empty<1>({want_prediction ? rows : 0}, aoti_torch_dtype_int64(), place),
        reduced ? empty<0>({}, dtype, place) : empty<1>({0}, dtype, place)};
    args.batch.gradient_scale = args.reduction == kMean ? static_cast<A>(1.0 / static_cast<double>(rows)) : A(1);
    args.batch.loss = static_cast<A*>(out.loss.mutable_data_ptr());
    if (want_gradient) args.batch.gradient = static_cast<S*>(out.gradient.mutable_data_ptr());
    if (want_fields) args.batch.fields = static_cast<A*>(out.fields.mutable_data_ptr());
    if (want_prediction) args.batch.prediction = static_cast<std::int64_t*>(out.prediction.mutable_data_ptr());
    args.correction = static_cast<A*>(out.correction.mutable_data_ptr());

    const std::int64_t row_bytes = args.batch.logits.row_stride * static_cast<std::int64_t>(sizeof(S));
    const bool whole = classes % (16 / std::int64_t(sizeof(S))) == 0 && is_aligned(args.batch.logits.data, row_bytes) &&
                       is_aligned(args.batch.gradient, 0);
    const Plan plan = plan_forward(rows, classes, sizeof(S), whole, want_gradient, launcher.device());
    args.log_lanes = plan.log_lanes;
    args.splits = plan.shares;

    // Workspace: a ticket, which must be 0, in front; then what the blocks leave for the last of them.
    const bool split = plan.kernel == ForwardKernel::split_rows;
    const std::int64_t summed = plan.cluster ? rows : plan.blocks;
    const bool shared_work = rows > 0 && (split || (reduced && summed > 1));
    const std::int64_t values = split ? 3 * plan.blocks : 2 * summed, places = split ? plan.blocks : 0;
    const std::int64_t bytes = 16 + values * std::int64_t(sizeof(A)) + places * 4;
    const Tensor workspace = empty<1>({shared_work ? bytes : 0}, aoti_torch_dtype_uint8(), place);
    if (shared_work) {
      char* base = static_cast<char*>(workspace.mutable_data_ptr());
      args.ticket = reinterpret_cast<unsigned*>(base);
      args.partial = args.parts = reinterpret_cast<A*>(base + 16);
      args.places = reinterpret_cast<unsigned*>(base + 16 + values * std::int64_t(sizeof(A)));
      launcher.fill(base, 0, 4);
    }
    const Touched touched{launcher, place};
    touched("logits", logits, sizeof(S));
    touched("target", target, 8);
    touched("q", q, knob_size(q));
    touched("bootstrap_weight", bootstrap_weight, knob_size(bootstrap_weight));
    if (weight) touched("weight", *weight, sizeof(A));
    touched("loss", out.loss, sizeof(A));
    touched("gradient", out.gradient, sizeof(S));
    touched("fields", out.fields, sizeof(A));
    touched("prediction", out.prediction, 8);
    touched("correction", out.correction, sizeof(A));
    touched("workspace", workspace, 1);
    if (rows > 0)
      launcher.launch(
          kernels_of<S>().forward[static_cast<int>(plan.kernel)],
          {plan.blocks, 1, plan.threads, plan.shared, plan.cluster ? plan.shares : 1}, args);
    else if (reduced) {
      // The mean of no rows is 0 / 0: all bits set are a NaN.
      launcher.fill(args.batch.loss, args.reduction == kMean ? 0xff : 0, sizeof(A));
      launcher.fill(args.correction, 0, sizeof(A));
    }
    return out;
  });
}

using Loss = std::tuple<Tensor, Tensor, Tensor>;                           // loss, gradient or empty, correction
using LossAndFields = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // with fields and prediction before the last

Loss loss_cuda(
    Tensor logits, Tensor target, Tensor q, Tensor bootstrap_weight, std::optional<Tensor> weight,
    std::int64_t ignore_index, std::int64_t reduction, bool hard, bool want_gradient) {
  const Outputs out = run_loss(
      logits, target, q, bootstrap_weight, weight, ignore_index, reduction, hard, want_gradient, false, false);
  return {out.loss, out.gradient, out.correction};
}

LossAndFields loss_and_fields_cuda(
    Tensor logits, Tensor target, Tensor q, Tensor bootstrap_weight, std::optional<Tensor> weight,
    std::int64_t ignore_index, std::int64_t reduction, bool hard, bool want_gradient, bool want_prediction) {
  const Outputs out = run_loss(
      logits, target, q, bootstrap_weight, weight, ignore_index, reduction, hard, want_gradient, want_prediction, true);
  return {out.loss, out.gradient, out.fields, out.prediction, out.correction};
}

// The gradient from the fields, into `out`; with `if_changed` only where it is not what stands there.
void write_gradient(
    const Tensor& out, const Tensor& given, const Tensor& target, const Tensor& fields, const Tensor& prediction,
    const Tensor& upstream, std::int64_t ignore_index, const Tensor& correction, bool if_changed) {
  const Tensor logits = with_unit_class_stride(given);
  const Place place = Place::of(logits);
  const auto guard = guard_of(place);
  Launcher launcher = launcher_for(place);
  dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    require(correction.numel() <= 1 && dtype_of(correction) == dtype_code<A>(),
            "correction must be one value in the dtype of the loss, or empty");
    Backward<S> args{};
    args.batch = backward_batch<S>(logits, target, fields, prediction, upstream, ignore_index, out);
    if (correction.numel()) args.correction = static_cast<const A*>(correction.const_data_ptr());
    args.if_changed = if_changed;
    const BackwardPlan plan = plan_backward(args.batch.logits.rows, args.batch.logits.classes, sizeof(S));
    args.lanes = plan.lanes;
    const Touched touched{launcher, place};
    touched("logits", logits, sizeof(S));
    touched("target", target, 8);
    touched("fields", fields, sizeof(A));
    touched("prediction", prediction, 8);
    touched("upstream", upstream, sizeof(A));
    touched("correction", correction, sizeof(A));
    touched("gradient", out, sizeof(S));
    if (args.batch.logits.rows > 0)
      launcher.launch(kernels_of<S>().gradient, {plan.blocks, plan.parts, plan.threads}, args);
    return 0;
  });
}

Tensor gradient_cuda(
    Tensor logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, std::int64_t ignore_index,
    Tensor correction) {
  require(logits.dim() == 2, "logits must be (N, C) with C >= 1");
  Tensor out = empty<2>({logits.size(0), logits.size(1)}, dtype_of(logits), Place::of(logits));
  write_gradient(out, logits, target, fields, prediction, upstream, ignore_index, correction, false);
  return out;
}

void rewrite_gradient_cuda(
    Tensor gradient, Tensor logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream,
    std::int64_t ignore_index, Tensor correction) {
  require(gradient.is_contiguous() && dtype_of(gradient) == dtype_of(logits) && gradient.numel() == logits.numel(),
          "gradient must be contiguous, in shape and dtype those of logits");
  require(upstream.dim() == 0 && correction.numel() == 1,
          "one factor for all rows: upstream and correction must be 0-d");
  write_gradient(gradient, logits, target, fields, prediction, upstream, ignore_index, correction, true);
}

void scale_gradient_cuda(Tensor gradient, Tensor upstream, Tensor correction) {
  const Place place = Place::of(gradient);
  const auto guard = guard_of(place);
  Launcher launcher = launcher_for(place);
  require(gradient.is_contiguous() && upstream.numel() == 1 && correction.numel() == 1 &&
              dtype_of(upstream) == dtype_of(gradient) && dtype_of(correction) == dtype_of(gradient),
          "gradient must be contiguous float32 or float64; upstream and correction one value in the same dtype");
  dispatch(gradient, [&](auto storage) {
    using A = decltype(storage);
    if constexpr (std::is_floating_point_v<A>) {
      const Touched touched{launcher, place};
      touched("gradient", gradient, sizeof(A));
      touched("upstream", upstream, sizeof(A));
      touched("correction", correction, sizeof(A));
      const Rescale<A> args{
          static_cast<A*>(gradient.mutable_data_ptr()), static_cast<const A*>(upstream.const_data_ptr()),
          static_cast<const A*>(correction.const_data_ptr()), gradient.numel()};
      const RescalePlan plan = plan_rescale(args.size, sizeof(A), launcher.device());
      if (args.size > 0) launcher.launch(kernels_of<A>().scale, {plan.blocks, 1, plan.threads}, args);
    } else {
      require(false, "gradient must be float32 or float64: a rounded one is made again, not scaled");
    }
    return 0;
  });
}

}  // namespace
}  // namespace dal

STABLE_TORCH_LIBRARY_FRAGMENT(dal_kernels, m) {
  m.def("loss_cuda(" DAL_LOSS_ARGUMENTS ") -> (Tensor, Tensor, Tensor)");
  m.def("loss_and_fields_cuda(" DAL_LOSS_ARGUMENTS
        ", bool want_prediction) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gradient_cuda(" DAL_GRADIENT_ARGUMENTS ", Tensor correction) -> Tensor");
  m.def("rewrite_gradient_cuda(Tensor(a!) gradient, " DAL_GRADIENT_ARGUMENTS ", Tensor correction) -> ()");
  m.def("scale_gradient_cuda(Tensor(a!) gradient, Tensor upstream, Tensor correction) -> ()");
}

// CPU tensors: for an emulator.
#define DAL_CUDA_OPERATORS(m)                                                 \
  m.impl("loss_cuda", TORCH_BOX(&dal::loss_cuda));                            \
  m.impl("loss_and_fields_cuda", TORCH_BOX(&dal::loss_and_fields_cuda));      \
  m.impl("gradient_cuda", TORCH_BOX(&dal::gradient_cuda));                    \
  m.impl("rewrite_gradient_cuda", TORCH_BOX(&dal::rewrite_gradient_cuda));    \
  m.impl("scale_gradient_cuda", TORCH_BOX(&dal::scale_gradient_cuda))

STABLE_TORCH_LIBRARY_IMPL(dal_kernels, CPU, m) { DAL_CUDA_OPERATORS(m); }
STABLE_TORCH_LIBRARY_IMPL(dal_kernels, CUDA, m) { DAL_CUDA_OPERATORS(m); }

namespace {

// emulate(callable, capability, multiprocessors): runs CPU tensors through it from now on; emulate(None): no more.
PyObject* emulate(PyObject*, PyObject* arguments) {
  PyObject* callable = nullptr;
  dal::Device device{90, 132};
  if (!PyArg_ParseTuple(arguments, "O|ii", &callable, &device.capability, &device.multiprocessors)) return nullptr;
  delete dal::emulator;
  dal::emulator = callable == Py_None ? nullptr : new dal::PythonEmulator(callable, device);
  Py_RETURN_NONE;
}

PyObject* emulates(PyObject*, PyObject*) { return PyBool_FromLong(dal::emulator != nullptr); }

}  // namespace

PyMODINIT_FUNC PyInit__cuda(void) {
  static PyMethodDef methods[] = {
      {"emulate", emulate, METH_VARARGS,
       "emulate(callable, capability=90, multiprocessors=132): run kernels for CPU tensors through callable(kernel, "
       "grid, threads, shared, arguments, buffers); emulate(None) ends that."},
      {"emulates", emulates, METH_NOARGS, "Whether an emulator is installed."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", "CUDA C++ kernels of dal_kernels.", -1, methods, nullptr, nullptr, nullptr,
      nullptr};
  return PyModule_Create(&definition);
}
