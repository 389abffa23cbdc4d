// The CPU operators, on the LibTorch stable ABI: one binary for every torch from 2.10 and Python from 3.10.
#include <Python.h>

#include <tuple>

#include "follow.h"
#include "layouts.h"
#include "run.h"
#include "threads.h"

namespace dal {
namespace {

// Every output of an operator costs most of a microsecond, so what training does not need has an operator of its own.
using Loss = std::tuple<Tensor, Tensor>;                           // loss, gradient (N, C) or empty
using LossAndFields = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // the same, fields (F, N), prediction (N,) or empty

template <bool FIELDS>
auto run_loss(
    const Tensor& given, const Tensor& target, const Tensor& knobs, const std::optional<Tensor>& weight,
    std::int64_t objective, std::int64_t ignore_index, std::int64_t reduction, bool want_gradient,
    bool want_prediction, const PaceGiven* pace = nullptr) {
  const Place place = Place::of(given);
  return dispatch(given, [&](auto storage) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    const GivenRows<S> logits(given);
    ForwardBatch<S> batch =
        forward_batch<S>(logits.logits(), target, knobs, weight, objective, ignore_index, reduction);
    const std::int64_t rows = batch.logits.rows;
    const bool scalar = reduction != kNone;
    Tensor loss = scalar ? empty<0>({}, dtype_code<A>(), place) : empty<1>({rows}, dtype_code<A>(), place);
    std::vector<A> row_loss(scalar ? rows : 0);
    batch.loss = scalar ? row_loss.data() : static_cast<A*>(loss.mutable_data_ptr());
    Tensor gradient = want_gradient ? logits.empty_gradient() : empty<1>({0}, dtype_of(given), place);
    if (want_gradient) batch.gradient = static_cast<S*>(gradient.mutable_data_ptr());

    const auto run = [&] {
      const double reduced =
          forward(batch, static_cast<Reduction>(reduction), kernel_of<S>(row_kernels()), logits.lanes(), TorchThreads{});
      if (scalar) *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(reduced);
    };
    if constexpr (FIELDS) {
      Tensor fields = empty<2>({is_wide(objective) ? kFields : kNarrowFields, rows}, dtype_code<A>(), place);
      Tensor prediction = empty<1>({want_prediction ? rows : 0}, aoti_torch_dtype_int64(), place);
      batch.fields = static_cast<A*>(fields.mutable_data_ptr());
      if (want_prediction) batch.prediction = static_cast<std::int64_t*>(prediction.mutable_data_ptr());
      run();
      // Last, because the rows may have had these numbers for their knobs.
      if (pace) follow_rows(*pace_of(pace->numbers), pace_rows(batch, pace->every), pace->limits);
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

// The same with prediction, and then as `see`.
LossAndFields loss_and_pace_cpu(
    Tensor logits, Tensor target, Tensor knobs, std::optional<Tensor> weight, std::int64_t objective,
    std::int64_t ignore_index, std::int64_t reduction, bool want_gradient, Tensor numbers, std::int64_t every,
    double q_end, double max_weight) {
  const PaceGiven pace{numbers, every, {q_end, max_weight}};
  return run_loss<true>(
      logits, target, knobs, weight, objective, ignore_index, reduction, want_gradient, true, &pace);
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
  return dispatch(given, [&](auto storage) {
    using S = decltype(storage);
    const GivenRows<S> logits(given);
    Tensor gradient = logits.empty_gradient();
    recompute(backward_batch<S>(logits.logits(), target, fields, prediction, upstream, ignore_index, gradient),
              kernel_of<S>(row_kernels()), logits.lanes(), TorchThreads{});
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
    const GivenRows<S> rows(logits);
    recompute(backward_batch<S>(rows.logits(), target, fields, prediction, upstream, ignore_index, logits),
              kernel_of<S>(row_kernels()), rows.lanes(), TorchThreads{});
  });
}

Targets targets_of(const Tensor& targets, const Tensor& logits, std::int64_t ignore_index) {
  require(targets.dim() == 2 && targets.size(0) > 0 && targets.size(1) == logits.size(0) &&
              targets.scalar_type() == ScalarType::Long,
          "targets must be (T, N) int64 with T >= 1");
  return {static_cast<const std::int64_t*>(targets.const_data_ptr()), targets.size(0), targets.stride(0),
          targets.stride(1), ignore_index};
}

// How many values the sums of a row are.
template <class A> constexpr std::int64_t kRowSums = sizeof(RowSums<A>) / sizeof(A);

// ln p_y (T, N); entropy, largest ln p, sum of ln p, sum of p^2 and predicted class (N,); sums for the gradient.
using Quantities = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Quantities quantities_cpu(Tensor given, Tensor targets, std::int64_t ignore_index) {
  const Tensor logits = with_unit_class_stride(given);
  const Place place = Place::of(logits);
  return dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    const std::int64_t rows = logits.size(0);
    QuantitiesBatch<S> batch{};
    batch.logits = logits_of<S>(logits);
    batch.targets = targets_of(targets, logits, ignore_index);
    const auto vector = [&](A*& data) {
      Tensor values = empty<1>({rows}, dtype_code<A>(), place);
      data = static_cast<A*>(values.mutable_data_ptr());
      return values;
    };
    Tensor log_prob = empty<2>({batch.targets.count, rows}, dtype_code<A>(), place);
    batch.log_prob = static_cast<A*>(log_prob.mutable_data_ptr());
    Tensor entropy = vector(batch.entropy), max_log_prob = vector(batch.max_log_prob);
    Tensor sum_log_prob = vector(batch.sum_log_prob), square_sum = vector(batch.square_sum);
    Tensor argmax = empty<1>({rows}, aoti_torch_dtype_int64(), place);
    batch.argmax = static_cast<std::int64_t*>(argmax.mutable_data_ptr());
    Tensor sums = empty<2>({rows, kRowSums<A>}, dtype_code<A>(), place);
    batch.sums = static_cast<RowSums<A>*>(sums.mutable_data_ptr());
    quantities(batch, kernel_of<S>(row_kernels()), TorchThreads{});
    return Quantities{log_prob, entropy, max_log_prob, sum_log_prob, square_sum, argmax, sums};
  });
}

using Slope = std::optional<Tensor>;

template <class A>
Upstream<A> upstream_of(const Slope& values, std::int64_t targets, std::int64_t rows) {
  if (!values) return {};
  const bool each = targets > 0;
  require(dtype_of(*values) == dtype_code<A>() && values->dim() == (each ? 2 : 1) &&
              (!each || values->size(0) == targets) && values->size(each) == rows,
          "slopes must be (N,), by ln p_y (T, N), in the dtype of the loss");
  return {static_cast<const A*>(values->const_data_ptr()), values->stride(each), each ? values->stride(0) : 0};
}

Tensor gradient_of_slopes_cpu(
    Tensor given, Tensor targets, std::int64_t ignore_index, Tensor argmax, Tensor sums, Slope by_log_prob,
    Slope by_entropy, Slope by_max_log_prob, Slope by_sum_log_prob, Slope by_square_sum) {
  const Tensor logits = with_unit_class_stride(given);
  return dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    const std::int64_t rows = logits.size(0);
    require(argmax.scalar_type() == ScalarType::Long && argmax.dim() == 1 && argmax.size(0) == rows &&
                argmax.is_contiguous() && dtype_of(sums) == dtype_code<A>() && sums.dim() == 2 &&
                sums.size(0) == rows && sums.size(1) == kRowSums<A> && sums.is_contiguous(),
            "argmax and sums must be those of quantities_cpu");
    Tensor gradient = empty<2>({rows, logits.size(1)}, dtype_of(logits), Place::of(logits));
    const Targets of_rows = targets_of(targets, logits, ignore_index);
    backward(
        SlopesBatch<S>{
            logits_of<S>(logits), of_rows, static_cast<const RowSums<A>*>(sums.const_data_ptr()),
            static_cast<const std::int64_t*>(argmax.const_data_ptr()), upstream_of<A>(by_log_prob, of_rows.count, rows),
            upstream_of<A>(by_entropy, 0, rows), upstream_of<A>(by_max_log_prob, 0, rows),
            upstream_of<A>(by_sum_log_prob, 0, rows), upstream_of<A>(by_square_sum, 0, rows),
            static_cast<S*>(gradient.mutable_data_ptr())},
        kernel_of<S>(row_kernels()).gradients_of_slopes, TorchThreads{});
    return gradient;
  });
}

}  // namespace
}  // namespace dal

STABLE_TORCH_LIBRARY_FRAGMENT(dal_kernels, m) {
  m.def("loss_cpu(" DAL_LOSS_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("loss_and_fields_cpu(" DAL_LOSS_ARGUMENTS ", bool want_prediction) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("loss_and_pace_cpu(" DAL_LOSS_AND_PACE_ARGUMENTS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gradient_cpu(" DAL_GRADIENT_ARGUMENTS ") -> Tensor");
  m.def("statistics_cpu(Tensor logits, bool want_argmax, bool wide) -> (Tensor, Tensor)");
  m.def("quantities_cpu(Tensor logits, Tensor targets, int ignore_index) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gradient_of_slopes_cpu(Tensor logits, Tensor targets, int ignore_index, Tensor argmax, Tensor sums, "
        "Tensor? by_log_prob, Tensor? by_entropy, Tensor? by_max_log_prob, Tensor? by_sum_log_prob, "
        "Tensor? by_square_sum) -> Tensor");
  m.def("overwrite_cpu(" DAL_OVERWRITE_ARGUMENTS ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dal_kernels, CPU, m) {
  m.impl("loss_cpu", TORCH_BOX(&dal::loss_cpu));
  m.impl("loss_and_fields_cpu", TORCH_BOX(&dal::loss_and_fields_cpu));
  m.impl("loss_and_pace_cpu", TORCH_BOX(&dal::loss_and_pace_cpu));
  m.impl("gradient_cpu", TORCH_BOX(&dal::gradient_cpu));
  m.impl("statistics_cpu", TORCH_BOX(&dal::statistics_cpu));
  m.impl("quantities_cpu", TORCH_BOX(&dal::quantities_cpu));
  m.impl("gradient_of_slopes_cpu", TORCH_BOX(&dal::gradient_of_slopes_cpu));
  m.impl("overwrite_cpu", TORCH_BOX(&dal::overwrite_cpu));
}

// Importing the module registers the operators; it also says which instruction set was taken, and of the
// processor what torch does not tell.
PyMODINIT_FUNC PyInit__native(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_native", "Fused CPU kernels of dal_kernels.", -1, nullptr, nullptr, nullptr, nullptr,
      nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && (PyModule_AddStringConstant(module, "instruction_set", dal::row_kernels_name()) < 0 ||
                 PyModule_AddIntConstant(module, "bfloat16_products_are_fast", dal::bfloat16_products_are_fast()) < 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
