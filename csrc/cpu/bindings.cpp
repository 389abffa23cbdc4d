// The CPU operators, on the LibTorch stable ABI: one binary for every torch from 2.10 and Python from 3.10.
#include <Python.h>

#include <tuple>

#include "run.h"
#include "../tensors.h"

namespace dal {
namespace {

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

// Every output of an operator costs most of a microsecond, so what training does not need has an operator of its own.
using Loss = std::tuple<Tensor, Tensor>;                           // loss, gradient (N, C) or empty
using LossAndFields = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // the same, fields (F, N), prediction (N,) or empty

template <bool FIELDS>
auto run_loss(
    const Tensor& given, const Tensor& target, const Tensor& knobs, const std::optional<Tensor>& weight,
    std::int64_t objective, std::int64_t ignore_index, std::int64_t reduction, bool want_gradient,
    bool want_prediction) {
  const Tensor logits = with_unit_class_stride(given);
  const Place place = Place::of(logits);
  return dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    ForwardBatch<S> batch = forward_batch<S>(logits, target, knobs, weight, objective, ignore_index, reduction);
    const std::int64_t rows = batch.logits.rows, classes = batch.logits.classes;
    const bool scalar = reduction != kNone;
    Tensor loss = scalar ? empty<0>({}, dtype_code<A>(), place) : empty<1>({rows}, dtype_code<A>(), place);
    std::vector<A> row_loss(scalar ? rows : 0);
    batch.loss = scalar ? row_loss.data() : static_cast<A*>(loss.mutable_data_ptr());
    Tensor gradient =
        want_gradient ? empty<2>({rows, classes}, dtype_of(logits), place) : empty<1>({0}, dtype_of(logits), place);
    if (want_gradient) batch.gradient = static_cast<S*>(gradient.mutable_data_ptr());

    const auto run = [&] {
      const double reduced =
          forward(batch, static_cast<Reduction>(reduction), kernel_of<S>(row_kernels()), TorchThreads{});
      if (scalar) *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(reduced);
    };
    if constexpr (FIELDS) {
      Tensor fields = empty<2>({is_wide(objective) ? kFields : kNarrowFields, rows}, dtype_code<A>(), place);
      Tensor prediction = empty<1>({want_prediction ? rows : 0}, aoti_torch_dtype_int64(), place);
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
    Tensor logits, Tensor target, Tensor knobs, std::optional<Tensor> weight, std::int64_t objective,
    std::int64_t ignore_index, std::int64_t reduction, bool want_gradient) {
  return run_loss<false>(logits, target, knobs, weight, objective, ignore_index, reduction, want_gradient, false);
}

LossAndFields loss_and_fields_cpu(
    Tensor logits, Tensor target, Tensor knobs, std::optional<Tensor> weight, std::int64_t objective,
    std::int64_t ignore_index, std::int64_t reduction, bool want_gradient, bool want_prediction) {
  return run_loss<true>(
      logits, target, knobs, weight, objective, ignore_index, reduction, want_gradient, want_prediction);
}

std::tuple<Tensor, Tensor> statistics_cpu(Tensor given, bool want_argmax, bool wide) {
  const Tensor logits = with_unit_class_stride(given);
  const Place place = Place::of(logits);
  return dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    const std::int64_t rows = logits.size(0);
    Tensor values = empty<2>({wide ? 5 : 3, rows}, dtype_code<A>(), place);
    Tensor argmax = empty<1>({want_argmax ? rows : 0}, aoti_torch_dtype_int64(), place);
    sums(SumsBatch<S>{logits_of<S>(logits), wide, static_cast<A*>(values.mutable_data_ptr()),
                      want_argmax ? static_cast<std::int64_t*>(argmax.mutable_data_ptr()) : nullptr},
         kernel_of<S>(row_kernels()), TorchThreads{});
    return std::tuple<Tensor, Tensor>{values, argmax};
  });
}

Tensor gradient_cpu(
    Tensor given, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, std::int64_t ignore_index) {
  const Tensor logits = with_unit_class_stride(given);
  return dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    Tensor gradient = empty<2>({logits.size(0), logits.size(1)}, dtype_of(logits), Place::of(logits));
    backward(backward_batch<S>(logits, target, fields, prediction, upstream, ignore_index, gradient),
             kernel_of<S>(row_kernels()), TorchThreads{});
    return gradient;
  });
}

// The same over the logits themselves: every class is read before it is written.
void overwrite_cpu(
    Tensor logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, std::int64_t ignore_index) {
  require(logits.dim() == 2 && logits.size(1) > 0 && logits.is_contiguous(),
          "logits must be a contiguous (N, C) with C >= 1");
  dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    backward(backward_batch<S>(logits, target, fields, prediction, upstream, ignore_index, logits),
             kernel_of<S>(row_kernels()), TorchThreads{});
  });
}

}  // namespace
}  // namespace dal

STABLE_TORCH_LIBRARY_FRAGMENT(dal_kernels, m) {
  m.def("loss_cpu(" DAL_LOSS_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("loss_and_fields_cpu(" DAL_LOSS_ARGUMENTS ", bool want_prediction) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gradient_cpu(" DAL_GRADIENT_ARGUMENTS ") -> Tensor");
  m.def("statistics_cpu(Tensor logits, bool want_argmax, bool wide) -> (Tensor, Tensor)");
  m.def("overwrite_cpu(Tensor(a!) logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, "
        "int ignore_index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dal_kernels, CPU, m) {
  m.impl("loss_cpu", TORCH_BOX(&dal::loss_cpu));
  m.impl("loss_and_fields_cpu", TORCH_BOX(&dal::loss_and_fields_cpu));
  m.impl("gradient_cpu", TORCH_BOX(&dal::gradient_cpu));
  m.impl("statistics_cpu", TORCH_BOX(&dal::statistics_cpu));
  m.impl("overwrite_cpu", TORCH_BOX(&dal::overwrite_cpu));
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
