// The CUDA operators, on the LibTorch stable ABI. Nothing here waits for the device.
#include <tuple>

#include "layouts.h"
#include "operator.h"

namespace dal {
namespace {

void require_classes(std::int64_t classes) {
  require(classes < std::int64_t(1) << 27, "logits must have fewer than 2^27 classes");
}

bool is_aligned(const void* data, std::int64_t stride_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

struct Outputs {
  Tensor loss, gradient, correction;
  std::optional<Tensor> fields, prediction;  // where the fields are wanted
};

Outputs run_loss(
    const Tensor& given, const Tensor& target, const Tensor& knobs, const std::optional<Tensor>& weight,
    std::int64_t objective, std::int64_t ignore_index, std::int64_t reduction, bool want_gradient,
    bool want_prediction, bool want_fields, const PaceGiven* pace = nullptr) {
  const GivenRows rows_given(given);
  const Tensor& logits = rows_given.tensor();
  const Place place = Place::of(logits);
  const auto guard = guard_of(place);
  Launcher launcher = launcher_for(place);
  return dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    const bool apart = rows_given.is_apart();
    Forward<S> args{};
    args.layouts = rows_given.layouts();
    args.batch = forward_batch<S>(rows_given.logits<S>(), target, knobs, weight, objective, ignore_index, reduction);
    args.reduction = static_cast<Reduction>(reduction);
    const std::int64_t rows = args.batch.logits.rows, classes = args.batch.logits.classes;
    const bool wide = is_wide(objective);
    require_classes(classes);
    require(!wide || !want_gradient || apart,
            "no forward writes the gradient of a loss that sums over all classes: it is made from the fields");
    const bool reduced = args.reduction != kNone;
    const std::int32_t dtype = dtype_code<A>();
    Outputs out{
        reduced ? empty<0>({}, dtype, place) : empty<1>({rows}, dtype, place),
        want_gradient ? rows_given.empty_gradient() : empty<1>({0}, dtype_of(logits), place),
        reduced ? empty<0>({}, dtype, place) : empty<1>({0}, dtype, place), std::nullopt, std::nullopt};
    if (want_fields) {
      const std::int64_t kept = wide ? kFields : want_prediction ? kNarrowFields : kGradientFields;
      out.fields = empty<2>({kept, rows}, dtype, place);
      out.prediction = empty<1>({want_prediction ? rows : 0}, aoti_torch_dtype_int64(), place);
      args.batch.fields = static_cast<A*>(out.fields->mutable_data_ptr());
      if (want_prediction) args.batch.prediction = static_cast<std::int64_t*>(out.prediction->mutable_data_ptr());
    }
    args.batch.gradient_scale = args.reduction == kMean ? static_cast<A>(1.0 / static_cast<double>(rows)) : A(1);
    args.batch.loss = static_cast<A*>(out.loss.mutable_data_ptr());
    if (want_gradient) args.batch.gradient = static_cast<S*>(out.gradient.mutable_data_ptr());
    args.correction = static_cast<A*>(out.correction.mutable_data_ptr());

    const std::int64_t row_bytes = args.batch.logits.row_stride * static_cast<std::int64_t>(sizeof(S));
    const bool whole = classes % (16 / std::int64_t(sizeof(S))) == 0 && is_aligned(args.batch.logits.data, row_bytes) &&
                       is_aligned(args.batch.gradient, 0);
    const Plan plan = apart ? plan_apart(rows, classes, wide)
                            : plan_forward(rows, classes, sizeof(S), whole, want_gradient, wide, launcher.device());
    args.log_lanes = plan.log_lanes;
    args.splits = plan.shares;

    // Workspace: a ticket in front; then what the blocks leave for the last of them.
    const bool split = plan.shares > 1 && !plan.cluster;
    const std::int64_t summed = plan.cluster ? rows : plan.blocks;
    const bool shared_work = rows > 0 && (split || (reduced && summed > 1));
    const std::int64_t values = split ? (wide ? 6 : 3) * plan.blocks : 2 * summed, places = split ? plan.blocks : 0;
    const std::int64_t learnt = pace && summed < rows ? summed : 0;
    const std::int64_t bytes =
        16 + learnt * std::int64_t(sizeof(Learnt)) + values * std::int64_t(sizeof(A)) + places * 4;
    std::optional<Tensor> workspace;
    if (shared_work) {
      char* base = static_cast<char*>(launcher.standing(bytes));
      if (!base) {
        workspace = empty<1>({bytes}, aoti_torch_dtype_uint8(), place);
        base = static_cast<char*>(workspace->mutable_data_ptr());
        launcher.fill(base, 0, sizeof(unsigned));
      }
      args.ticket = reinterpret_cast<unsigned*>(base);
      if (learnt) args.learnt = reinterpret_cast<Learnt*>(base + 16);
      args.partial = args.parts = reinterpret_cast<A*>(base + 16 + learnt * std::int64_t(sizeof(Learnt)));
      args.places = reinterpret_cast<unsigned*>(args.parts + values);
    }
    Follow<A> follow{};
    if (pace) {
      follow = {pace_of(pace->numbers), pace_rows(args.batch, pace->every), pace->limits};
      // Behind the losses, where those are reduced.
      if (reduced) args.follow = follow;
    }
    const Touched touched{launcher, place};
    touched("logits", logits, sizeof(S));
    touched("target", target, 8);
    touched("knobs", knobs, args.batch.knobs.is_double ? 8 : 4);
    if (weight) touched("weight", *weight, sizeof(A));
    touched("loss", out.loss, sizeof(A));
    touched("gradient", out.gradient, sizeof(S));
    if (out.fields) touched("fields", *out.fields, sizeof(A));
    if (out.prediction) touched("prediction", *out.prediction, 8);
    touched("correction", out.correction, sizeof(A));
    if (workspace) touched("workspace", *workspace, 1);
    if (pace) touched("numbers", pace->numbers, sizeof(float));
    if (rows > 0)
      launcher.launch(
          kernels_of<S>().forward[static_cast<int>(plan.kernel)],
          {plan.blocks, 1, plan.threads, plan.shared, plan.cluster ? plan.shares : 1}, args);
    else if (reduced) {
      // The mean of no rows is 0 / 0: all bits set are a NaN.
      launcher.fill(args.batch.loss, args.reduction == kMean ? 0xff : 0, sizeof(A));
      launcher.fill(args.correction, 0, sizeof(A));
    }
    if (pace && !(reduced && rows > 0)) launch_follow(launcher, follow);
    return out;
  });
}

using Loss = std::tuple<Tensor, Tensor, Tensor>;                           // loss, gradient or empty, correction
using LossAndFields = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // with fields and prediction before the last

Loss loss_cuda(
    Tensor logits, Tensor target, Tensor knobs, std::optional<Tensor> weight, std::int64_t objective,
    std::int64_t ignore_index, std::int64_t reduction, bool want_gradient) {
  const Outputs out =
      run_loss(logits, target, knobs, weight, objective, ignore_index, reduction, want_gradient, false, false);
  return {out.loss, out.gradient, out.correction};
}

LossAndFields loss_and_fields_cuda(
    Tensor logits, Tensor target, Tensor knobs, std::optional<Tensor> weight, std::int64_t objective,
    std::int64_t ignore_index, std::int64_t reduction, bool want_gradient, bool want_prediction) {
  const Outputs out =
      run_loss(logits, target, knobs, weight, objective, ignore_index, reduction, want_gradient, want_prediction, true);
  return {out.loss, out.gradient, *out.fields, *out.prediction, out.correction};
}

// The same with prediction, and then as `see`: in the launch of the loss, where that reduces it.
LossAndFields loss_and_pace_cuda(
    Tensor logits, Tensor target, Tensor knobs, std::optional<Tensor> weight, std::int64_t objective,
    std::int64_t ignore_index, std::int64_t reduction, bool want_gradient, Tensor numbers, std::int64_t every,
    double q_end, double max_weight) {
  const PaceGiven pace{numbers, every, {q_end, max_weight}};
  const Outputs out =
      run_loss(logits, target, knobs, weight, objective, ignore_index, reduction, want_gradient, true, true, &pace);
  return {out.loss, out.gradient, *out.fields, *out.prediction, out.correction};
}

std::tuple<Tensor, Tensor> statistics_cuda(Tensor given, bool want_argmax, bool wide) {
  const Tensor logits = with_unit_class_stride(given);
  const Place place = Place::of(logits);
  const auto guard = guard_of(place);
  Launcher launcher = launcher_for(place);
  return dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    const std::int64_t rows = logits.size(0);
    require_classes(logits.size(1));
    Tensor sums = empty<2>({wide ? 5 : 3, rows}, dtype_code<A>(), place);
    Tensor argmax = empty<1>({want_argmax ? rows : 0}, aoti_torch_dtype_int64(), place);
    const Touched touched{launcher, place};
    touched("logits", logits, sizeof(S));
    touched("sums", sums, sizeof(A));
    touched("argmax", argmax, 8);
    const SumsBatch<S> args{
        logits_of<S>(logits), wide, static_cast<A*>(sums.mutable_data_ptr()),
        want_argmax ? static_cast<std::int64_t*>(argmax.mutable_data_ptr()) : nullptr};
    if (rows > 0)
      launcher.launch(kernels_of<S>().statistics, {rows, 1, plan_statistics(logits.size(1), sizeof(S))}, args);
    return std::tuple<Tensor, Tensor>{sums, argmax};
  });
}

// The gradient from the fields, into `out`; with `if_changed` only where it is not what stands there.
void write_gradient(
    const Tensor& out, const Tensor& given, const Tensor& target, const Tensor& fields, const Tensor& prediction,
    const Tensor& upstream, std::int64_t ignore_index, const Tensor& correction, bool if_changed) {
  const GivenRows rows(given);
  const Tensor& logits = rows.tensor();
  const Place place = Place::of(logits);
  const auto guard = guard_of(place);
  Launcher launcher = launcher_for(place);
  dispatch(logits, [&](auto storage) {
    using S = decltype(storage);
    using A = Arithmetic<S>;
    require(correction.numel() <= 1 && dtype_of(correction) == dtype_code<A>(),
            "correction must be one value in the dtype of the loss, or empty");
    Backward<S> args{};
    args.batch = backward_batch<S>(rows.logits<S>(), target, fields, prediction, upstream, ignore_index, out);
    args.layouts = rows.layouts();
    if (correction.numel()) args.correction = static_cast<const A*>(correction.const_data_ptr());
    args.if_changed = if_changed;
    const std::int64_t count = args.batch.logits.rows, classes = args.batch.logits.classes;
    const BackwardPlan plan =
        rows.is_apart() ? plan_backward_apart(count, classes) : plan_backward(count, classes, sizeof(S));
    args.lanes = plan.lanes;
    const Touched touched{launcher, place};
    touched("logits", logits, sizeof(S));
    touched("target", target, 8);
    touched("fields", fields, sizeof(A));
    touched("prediction", prediction, 8);
    touched("upstream", upstream, sizeof(A));
    touched("correction", correction, sizeof(A));
    touched("gradient", out, sizeof(S));
    const Kernels& kernels = kernels_of<S>();
    const Kernel& kernel = rows.is_apart() ? (args.batch.wide ? kernels.gradient_apart_wide : kernels.gradient_apart)
                                           : (args.batch.wide ? kernels.gradient_wide : kernels.gradient);
    if (count > 0) launcher.launch(kernel, {plan.blocks, plan.parts, plan.threads}, args);
    return 0;
  });
}

Tensor gradient_cuda(
    Tensor logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, std::int64_t ignore_index,
    Tensor correction) {
  Tensor out = GivenRows(logits).empty_gradient();
  write_gradient(out, logits, target, fields, prediction, upstream, ignore_index, correction, false);
  return out;
}

// The same over the logits themselves.
void overwrite_cuda(
    Tensor logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, std::int64_t ignore_index,
    Tensor correction) {
  require(logits.dim() == 2 && logits.is_contiguous(), "logits must be a contiguous (N, C) with C >= 1");
  write_gradient(logits, logits, target, fields, prediction, upstream, ignore_index, correction, false);
}

void rewrite_gradient_cuda(
    Tensor gradient, Tensor logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream,
    std::int64_t ignore_index, Tensor correction) {
  require(dtype_of(gradient) == dtype_of(logits) && gradient.numel() == logits.numel(),
          "gradient must be of the shape and dtype of logits");
  require(upstream.dim() == 0 && correction.numel() == 1,
          "one factor for all rows: upstream and correction must be 0-d");
  if (GivenRows(logits).lies_as_made(gradient)) {
    write_gradient(gradient, logits, target, fields, prediction, upstream, ignore_index, correction, true);
  } else {  // one of the two has been away, as hooks of saved tensors take them, and has come back in another layout
    torch::stable::copy_(
        gradient, gradient_cuda(logits, target, fields, prediction, upstream, ignore_index, correction));
  }
}

void scale_gradient_cuda(Tensor gradient, Tensor upstream, Tensor correction) {
  const Place place = Place::of(gradient);
  const auto guard = guard_of(place);
  Launcher launcher = launcher_for(place);
  require(fills_its_memory(gradient) && upstream.numel() == 1 && correction.numel() == 1 &&
              dtype_of(upstream) == dtype_of(gradient) && dtype_of(correction) == dtype_of(gradient),
          "gradient must be float32 or float64 without gaps in memory; upstream and correction one value in the same dtype");
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
  m.def("loss_and_pace_cuda(" DAL_LOSS_AND_PACE_ARGUMENTS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("statistics_cuda(Tensor logits, bool want_argmax, bool wide) -> (Tensor, Tensor)");
  m.def("gradient_cuda(" DAL_GRADIENT_ARGUMENTS ", Tensor correction) -> Tensor");
  m.def("overwrite_cuda(" DAL_OVERWRITE_ARGUMENTS ", Tensor correction) -> ()");
  m.def("rewrite_gradient_cuda(Tensor(a!) gradient, " DAL_GRADIENT_ARGUMENTS ", Tensor correction) -> ()");
  m.def("scale_gradient_cuda(Tensor(a!) gradient, Tensor upstream, Tensor correction) -> ()");
}

// CPU tensors: for an emulator.
#define DAL_CUDA_OPERATORS(m)                                                 \
  m.impl("loss_cuda", TORCH_BOX(&dal::loss_cuda));                            \
  m.impl("loss_and_fields_cuda", TORCH_BOX(&dal::loss_and_fields_cuda));      \
  m.impl("loss_and_pace_cuda", TORCH_BOX(&dal::loss_and_pace_cuda));          \
  m.impl("statistics_cuda", TORCH_BOX(&dal::statistics_cuda));                \
  m.impl("gradient_cuda", TORCH_BOX(&dal::gradient_cuda));                    \
  m.impl("overwrite_cuda", TORCH_BOX(&dal::overwrite_cuda));                  \
  m.impl("rewrite_gradient_cuda", TORCH_BOX(&dal::rewrite_gradient_cuda));    \
  m.impl("scale_gradient_cuda", TORCH_BOX(&dal::scale_gradient_cuda))

STABLE_TORCH_LIBRARY_IMPL(dal_kernels, CPU, m) { DAL_CUDA_OPERATORS(m); }
STABLE_TORCH_LIBRARY_IMPL(dal_kernels, CUDA, m) { DAL_CUDA_OPERATORS(m); }

PyMODINIT_FUNC PyInit__cuda(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", "CUDA C++ kernels of dal_kernels.", -1, dal::emulator_methods, nullptr, nullptr,
      nullptr, nullptr};
  return PyModule_Create(&definition);
}
