// The loss as a node of the autograd graph: which buffers live from forward to backward. Nothing numeric happens here.
// dal_kernels/autograd.py is the same in Python, for what this extension cannot take.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/slice.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include "../batch.h"
#include "plain.h"
#include "replay.h"

namespace dal {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A schedule that the operator of the loss tells the statistics of the call.
struct Hearer {
  Tensor numbers;
  std::int64_t every;
  double q_end, max_weight;
};

// A checked call beside its logits (N, C).
struct LossCall {
  const Operators& operators;
  Tensor target;                 // (N,) int64
  Tensor knobs;                  // (K,)
  std::optional<Tensor> weight;  // (C,)
  std::int64_t objective, ignore_index, reduction;
  bool gradient_ready;   // whether the forward writes the gradient
  bool want_stats, may_be_edited;  // the statistics, by whoever gets them
  bool want_prediction;
  const Hearer* told;  // or null
  Tensor fields, prediction;  // left by the forward where the statistics are wanted

  // The loss, the gradient or an empty tensor, and the correction where there is one; with fields the fields and the
  // prediction before that.
  Values run(const Tensor& logits, bool want_gradient, bool want_fields) const {
    Values values{logits, target, knobs, weight, objective, ignore_index, reduction, want_gradient};
    if (told)
      torch::jit::push(values, told->numbers, told->every, told->q_end, told->max_weight);
    else if (want_fields)
      values.emplace_back(want_prediction);
    // Past the kernel that torch has for operators without an autograd of their own: it looks at each argument.
    const at::AutoDispatchBelowADInplaceOrView below;
    const Operator& op =
        told ? operators.loss_and_pace : want_fields ? operators.loss_and_fields : operators.loss;
    return called(op, std::move(values));
  }
};

// Identity on a gradient that says so when it is differentiated again. `anchor` ties it to the graph of the logits:
// without an edge there, a gradient penalty would skip this part in silence.
struct DifferentiableOnce : torch::autograd::Function<DifferentiableOnce> {
  static Tensor forward(AutogradContext*, const Tensor& gradient, const Tensor&) { return gradient.view_as(gradient); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(
        false,
        "the fused kernels of dynamics_aware_loss have no second derivative: "
        "pass backend='eager' for gradient penalties and other uses of create_graph=True");
  }
};

// Above this, logits are not kept alive just to be able to refuse a second derivative.
constexpr std::size_t kSmallBytes = 1 << 20;

inline Tensor anchor_of(const Tensor& logits) {
  const bool large = !logits.is_leaf() && logits.nbytes() > kSmallBytes;
  return large ? logits.slice(0, 0, 0).clone() : logits;
}

struct FusedLoss : torch::autograd::Function<FusedLoss> {
  static Tensor forward(AutogradContext* context, const Tensor& logits, LossCall* call, const Tensor* anchor) {
    // A bfloat16 gradient has been rounded already: to scale it by anything but 1 it is computed again.
    const bool recompute = !call->gradient_ready || logits.scalar_type() == at::kBFloat16;
    const bool want_fields = recompute || call->want_stats;
    Values made = call->run(logits, call->gradient_ready, want_fields);
    variable_list saved{made[1].toTensor()};
    if (want_fields) {
      const Tensor fields = made[2].toTensor(), prediction = made[3].toTensor();
      if (recompute) saved.insert(saved.end(), {logits, call->target, fields, prediction});
      if (call->want_stats) {
        const bool copied = recompute && call->may_be_edited;
        call->fields = copied ? fields.clone() : fields;
        call->prediction = copied ? prediction.clone() : prediction;
      }
    }
    for (std::size_t i = want_fields ? 4 : 2; i < made.size(); ++i) saved.push_back(made[i].toTensor());
    context->save_for_backward(std::move(saved));
    // What ties the gradient to the graph of the logits, should it be differentiated again.
    context->saved_data["anchor"] = *anchor;
    // In one number, because each entry costs as much as some of the checks of a call.
    context->saved_data["plan"] = (call->operators.id << 2) + (call->gradient_ready ? 2 : 0) + (recompute ? 1 : 0);
    if (recompute) context->saved_data["ignore_index"] = call->ignore_index;
    return made[0].toTensor();
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream_of_loss) {
    const Tensor& upstream = upstream_of_loss[0];
    const std::int64_t plan = context->saved_data["plan"].toInt();
    const Operators& operators = operators_of(plan >> 2);
    const bool gradient_ready = plan & 2, recompute = plan & 1;
    const bool keep_saved = !gradient_ready ||
                            torch::autograd::get_current_graph_task_keep_graph() || !is_plain(upstream) || is_watched();
    // Read once: hooks (checkpointing, offloading) may refuse to hand out a tensor a second time.
    const variable_list saved = context->get_saved_variables();
    Tensor gradient = saved[0];
    const auto made_again = [&](const Operator& op, bool in_place) {
      Values values;
      if (in_place) values.emplace_back(gradient);
      for (std::size_t i = 1; i < 5; ++i) values.emplace_back(saved[i]);
      values.emplace_back(upstream);
      values.emplace_back(context->saved_data["ignore_index"]);
      for (std::size_t i = 5; i < saved.size(); ++i) values.emplace_back(saved[i]);
      return called(op, std::move(values));
    };
    if (keep_saved && recompute) {
      gradient = made_again(operators.gradient, false)[0].toTensor();
    } else if (keep_saved) {
      gradient = gradient * upstream;
      for (std::size_t i = 1; i < saved.size(); ++i) gradient = gradient * saved[i];
    } else if (operators.rewrite_gradient) {
      // Nobody asks for the saved gradient again, so it may be scaled in place.
      if (recompute) made_again(*operators.rewrite_gradient, true);
      else called(*operators.scale_gradient, {gradient, upstream, saved.back()});
    } else if (upstream.item<double>() != 1.0) {
      gradient = recompute ? made_again(operators.gradient, false)[0].toTensor() : gradient.mul_(upstream);
    }
    if (at::GradMode::is_enabled())
      gradient = DifferentiableOnce::apply(gradient, context->saved_data["anchor"].toTensor());
    return {gradient, Tensor(), Tensor()};
  }
};

}  // namespace dal
