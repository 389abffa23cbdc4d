// The CPU operators, on the LibTorch stable ABI: one binary for every torch from 2.10 and Python from 3.10.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "cpu/run.h"

namespace dal {
namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

struct TorchThreads {
  std::int64_t count() const { return torch::stable::get_num_threads(); }
  template <class F>
  void run(std::int64_t size, std::int64_t grain, const F& f) const {
    if (size <= grain)
      f(0, size);
    else
      torch::stable::parallel_for(0, size, grain, f);
  }
};

template <std::size_t D>
Tensor empty_cpu(const std::array<std::int64_t, D>& sizes, std::int32_t dtype) {
  std::array<std::int64_t, D> strides{};
  std::int64_t stride = 1;
  for (std::size_t i = D; i-- > 0; stride *= std::max<std::int64_t>(1, sizes[i])) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      D, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class A>
std::int32_t dtype_code() {
  return std::is_same_v<A, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// Rows are read in place where neighbouring classes are neighbours in memory; any other layout is copied.
Tensor with_unit_class_stride(const Tensor& logits) {
  require(logits.dim() == 2 && logits.size(1) > 0, "logits must be (N, C) with C >= 1");
  return logits.stride(1) == 1 || logits.size(1) == 1 ? logits : torch::stable::contiguous(logits);
}

template <class S>
Logits<S> logits_of(const Tensor& logits) {
  return {static_cast<const S*>(logits.const_data_ptr()), logits.size(0), logits.size(1), logits.stride(0)};
}

Target target_of(const Tensor& target, const Tensor& logits, std::int64_t ignore_index) {
  require(target.dim() == 1 && target.size(0) == logits.size(0) && target.scalar_type() == ScalarType::Long,
          "target must be (N,) int64");
  return {static_cast<const std::int64_t*>(target.const_data_ptr()), target.stride(0), ignore_index};
}

std::int64_t row_stride(const Tensor& values, const Tensor& logits, const char* message) {
  const bool one = values.dim() == 0;
  require(one || (values.dim() == 1 && values.size(0) == logits.size(0)), message);
  return one ? 0 : values.stride(0);
}

Knob knob_of(const Tensor& value, const Tensor& logits) {
  const bool is_double = value.scalar_type() == ScalarType::Double;
  require(is_double || value.scalar_type() == ScalarType::Float, "q and bootstrap_weight must be float32 or float64, 0-d or one value a row");
  return {value.const_data_ptr(), is_double,
          row_stride(value, logits, "q and bootstrap_weight must be float32 or float64, 0-d or one value a row")};
}

// f(storage, kernel) with the storage type and row kernel of a dtype.
template <class F>
auto dispatch(const Tensor& logits, const F& f) {
  const RowKernels& kernels = row_kernels();
  switch (logits.scalar_type()) {
    case ScalarType::Double: return f(double{}, kernels.f64);
    case ScalarType::BFloat16: return f(BFloat16{}, kernels.bf16);
    case ScalarType::Half: return f(Float16{}, kernels.f16);
    default:
      require(logits.scalar_type() == ScalarType::Float, "logits must be float32, float64, bfloat16 or float16");
      return f(float{}, kernels.f32);
  }
}

std::int32_t dtype_of(const Tensor& tensor) {
  std::int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// Every output of an operator costs most of a microsecond, so what training does not need has an operator of its own.
using Loss = std::tuple<Tensor, Tensor>;                           // loss, gradient (N, C) or empty
using LossAndFields = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // the same, fields (kFields, N), prediction (N,)

template <bool FIELDS>
auto run_loss(
    const Tensor& given, const Tensor& target, const Tensor& q, const Tensor& bootstrap_weight,
    const std::optional<Tensor>& weight, std::int64_t ignore_index, std::int64_t reduction, bool hard,
    bool want_gradient, bool want_prediction) {
  const Tensor logits = with_unit_class_stride(given);
  return dispatch(logits, [&](auto storage, const auto& kernel) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    ForwardBatch<S> batch{};
    batch.logits = logits_of<S>(logits);
    batch.target = target_of(target, logits, ignore_index);
    batch.q = knob_of(q, logits);
    batch.bootstrap_weight = knob_of(bootstrap_weight, logits);
    batch.hard = hard;
    const std::int64_t rows = batch.logits.rows, classes = batch.logits.classes;
    if (weight) {
      require(dtype_of(*weight) == dtype_code<A>() && weight->dim() == 1 && weight->size(0) == classes,
              "weight must be (C,) in the dtype of the loss");
      batch.weight = static_cast<const A*>(weight->const_data_ptr());
      batch.weight_stride = weight->stride(0);
    }
    require(reduction == kNone || reduction == kMean || reduction == kSum, "reduction must be 0, 1 or 2");
    const bool scalar = reduction != kNone;
    Tensor loss = scalar ? empty_cpu<0>({}, dtype_code<A>()) : empty_cpu<1>({rows}, dtype_code<A>());
    std::vector<A> row_loss(scalar ? rows : 0);
    batch.loss = scalar ? row_loss.data() : static_cast<A*>(loss.mutable_data_ptr());
    Tensor gradient =
        want_gradient ? empty_cpu<2>({rows, classes}, dtype_of(logits)) : empty_cpu<1>({0}, dtype_of(logits));
    if (want_gradient) batch.gradient = static_cast<S*>(gradient.mutable_data_ptr());

    const auto run = [&] {
      const double reduced = forward(batch, static_cast<Reduction>(reduction), kernel, TorchThreads{});
      if (scalar) *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(reduced);
    };
    if constexpr (FIELDS) {
      Tensor fields = empty_cpu<2>({kFields, rows}, dtype_code<A>());
      Tensor prediction = empty_cpu<1>({want_prediction ? rows : 0}, aoti_torch_dtype_int64());
      batch.fields = static_cast<A*>(fields.mutable_data_ptr());
      if (want_prediction) batch.prediction = static_cast<std::int64_t*>(prediction.mutable_data_ptr());
      run();
      return LossAndFields{loss, gradient, fields, prediction};
    } else {
      run();
      return Loss{loss, gradient};
    }
  });
}

Loss loss_cpu(
    Tensor logits, Tensor target, Tensor q, Tensor bootstrap_weight, std::optional<Tensor> weight,
    std::int64_t ignore_index, std::int64_t reduction, bool hard, bool want_gradient) {
  return run_loss<false>(
      logits, target, q, bootstrap_weight, weight, ignore_index, reduction, hard, want_gradient, false);
}

LossAndFields loss_and_fields_cpu(
    Tensor logits, Tensor target, Tensor q, Tensor bootstrap_weight, std::optional<Tensor> weight,
    std::int64_t ignore_index, std::int64_t reduction, bool hard, bool want_gradient, bool want_prediction) {
  return run_loss<true>(
      logits, target, q, bootstrap_weight, weight, ignore_index, reduction, hard, want_gradient, want_prediction);
}

Tensor gradient_cpu(
    Tensor given, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, std::int64_t ignore_index) {
  const Tensor logits = with_unit_class_stride(given);
  return dispatch(logits, [&](auto storage, const auto& kernel) -> Tensor {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    require(dtype_of(upstream) == dtype_code<A>() && dtype_of(fields) == dtype_code<A>(),
            "upstream must be 0-d or one value a row; it and fields must be in the dtype of the loss");
    const Logits<S> in = logits_of<S>(logits);
    require(fields.dim() == 2 && fields.size(0) == kFields && fields.size(1) == in.rows && fields.is_contiguous(),
            "fields must be a contiguous (7, N)");
    require(prediction.scalar_type() == ScalarType::Long && prediction.dim() == 1 && prediction.is_contiguous() &&
                (prediction.size(0) == 0 || prediction.size(0) == in.rows),
            "prediction must be a contiguous (N,) int64 or empty");
    Tensor gradient = empty_cpu<2>({in.rows, in.classes}, dtype_of(logits));
    const BackwardBatch<S> batch{
        in,
        target_of(target, logits, ignore_index),
        static_cast<const A*>(fields.const_data_ptr()),
        prediction.numel() ? static_cast<const std::int64_t*>(prediction.const_data_ptr()) : nullptr,
        static_cast<const A*>(upstream.const_data_ptr()),
        row_stride(upstream, logits, "upstream must be 0-d or one value a row"),
        static_cast<S*>(gradient.mutable_data_ptr())};
    backward(batch, kernel, TorchThreads{});
    return gradient;
  });
}

}  // namespace
}  // namespace dal

#define DAL_LOSS_ARGUMENTS                                                                             \
  "Tensor logits, Tensor target, Tensor q, Tensor bootstrap_weight, Tensor? weight, int ignore_index, " \
  "int reduction, bool hard, bool want_gradient"

STABLE_TORCH_LIBRARY_FRAGMENT(dal_kernels, m) {
  m.def("loss_cpu(" DAL_LOSS_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("loss_and_fields_cpu(" DAL_LOSS_ARGUMENTS ", bool want_prediction) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gradient_cpu(Tensor logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, "
      "int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dal_kernels, CPU, m) {
  m.impl("loss_cpu", TORCH_BOX(&dal::loss_cpu));
  m.impl("loss_and_fields_cpu", TORCH_BOX(&dal::loss_and_fields_cpu));
  m.impl("gradient_cpu", TORCH_BOX(&dal::gradient_cpu));
}

// Importing the module registers the operators; it also says which instruction set was taken.
PyMODINIT_FUNC PyInit__native(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_native", "Fused CPU kernels of dal_kernels.", -1, nullptr, nullptr, nullptr, nullptr,
      nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "instruction_set", dal::row_kernels_name()) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
