// What every forward kernel does with the sums of a row: objective, fields, and the reduction of the losses.
#pragma once

#include "arguments.h"
#include "pace.cuh"
#include "slopes.cuh"

namespace dal {

// What is known of a row before its logits are read. Past the last row that one again: not live, and ignored.
template <class A> struct RowInput {
  std::int64_t row, target;
  bool live, ignored;
  A knobs[2];  // the first ones; the others, which few losses have, are read by who finishes the row
  A target_logit, weight;
};

// A knob of a row, or 0 where the loss has no such knob.
template <class A> DAL_D A knob_of(const Knobs& knobs, std::int64_t row, int knob) {
  return knob < knobs.count ? knobs.at<A>(row, knob) : A(0);
}

// Without branches but for the class weights. A label that is none costs its row, not the memory beside it. Not LOGIT:
// whoever has all logits of the row at hand finds that of the target among them.
template <class S, bool LOGIT = true> DAL_D RowInput<Arithmetic<S>> row_input(const ForwardBatch<S>& batch, std::int64_t row) {
  using A = Arithmetic<S>;
  RowInput<A> in;
  in.live = row < batch.logits.rows;
  in.row = in.live ? row : batch.logits.rows - 1;
  in.target = batch.target.at(in.row);
  in.ignored = !in.live || in.target == batch.target.ignore_index;
  for (int k = 0; k < 2; ++k) in.knobs[k] = knob_of<A>(batch.knobs, in.row, k);
  const bool valid = static_cast<std::uint64_t>(in.target) < static_cast<std::uint64_t>(batch.logits.classes);
  const std::int64_t label = valid ? in.target : 0;
  in.target_logit = not_a_number<A>();
  if constexpr (LOGIT) {
    const A logit = widen(batch.logits.row(in.row)[label]);
    if (valid) in.target_logit = logit;
  }
  in.weight = A(1);
  if (batch.weight) in.weight = valid ? batch.weight[label * batch.weight_stride] : A(0);
  if (in.ignored) in.weight = 0;
  return in;
}

// Nothing asks for W without an entropy term.
template <class S> DAL_D bool needs_entropy(const ForwardBatch<S>& batch, const RowInput<Arithmetic<S>>& in) {
  return batch.prediction || needs_entropy(batch.objective, in.knobs);
}

template <class S> DAL_D bool needs_place(const ForwardBatch<S>& batch) {
  return batch.prediction || needs_argmax(batch.objective);
}

// An ignored row is not read unless its statistics are wanted.
template <class S> DAL_D bool needs_reading(const ForwardBatch<S>& batch, const RowInput<Arithmetic<S>>& in) {
  return in.live && (batch.prediction || !in.ignored);
}

// What a row's logits are taken relative to: the largest, or 0 in a row of -inf alone, where -inf - -inf would be NaN.
template <class A> DAL_D A origin_of(A peak) { return peak == negative_infinity<A>() ? A(0) : peak; }
// Of a power. The difference first: it is 0 at the largest logit whatever its size, and exact near it. A product with a
// rounded one, subtracted in one fused multiply-add, would leave that rounding, which beyond 10^9 no power survives.
template <class A> DAL_D A exponent(A z, A origin) { return (z - origin) * kToExponent<A>; }

// A class as argmax orders them, the smallest being what it names: the first NaN, else the first maximum.
constexpr unsigned kNowhere = 0xffffffffu, kMaximum = 0x80000000u;
template <class A> DAL_D unsigned place_of(A z, A peak, int j) {
  return z != z ? static_cast<unsigned>(j) : z == peak ? static_cast<unsigned>(j) | kMaximum : kNowhere;
}
// The same, given the place among the classes after j.
template <class A> DAL_D unsigned first_place(unsigned later, A z, A peak, int j) {
  const unsigned here = z == peak && later >= kMaximum ? static_cast<unsigned>(j) | kMaximum : later;
  return z != z ? static_cast<unsigned>(j) : here;
}
DAL_D int class_at(unsigned place) { return static_cast<int>(place & 0x7fffffffu); }

// affine_gradient.h's form without its last two terms, of one class: with d = z - m, e^d (A + B d), and of WIDE
// losses e^d (A + B d + E e^d) + D.
template <bool WIDE, class A> DAL_D A affine_value(A z, const AffineGradient<A>& affine) {
  const A d = z - affine.max;
  if constexpr (WIDE) {
    const A e = power(d * kToExponent<A>);
    return fma(e, fma(affine.E, e, fma(affine.B, larger(d, kLowest<A>), affine.A)), affine.D);
  }
  return power(d * kToExponent<A>) * fma(affine.B, larger(d, kLowest<A>), affine.A);
}

// The two classes that differ from the affine rule, over what stands there in a row of the gradient: cheaper than a
// comparison an element. Only those in [begin, end). `argmax` < 0: no term at the predicted class.
template <class S, bool WIDE = false>
DAL_D void correct_terms(
    S* out, const AffineGradient<Arithmetic<S>>& affine, std::int64_t target, Arithmetic<S> target_logit, int argmax,
    int begin, int end) {
  using A = Arithmetic<S>;
  const A rest = WIDE ? affine.E + affine.D : A(0);
  if (argmax >= begin && argmax < end)
    narrow((WIDE ? affine.A + rest : affine.A) - affine.u, out[argmax]);  // z = m there
  if (target >= begin && target < end)
    narrow(
        affine_value<WIDE>(target_logit, affine) - affine.t - (target == argmax ? affine.u : A(0)), out[target]);
}

// The loss of a row and its slopes. DAL comes first and is made in place; without a bootstrap weight it is GCE.
template <class S, bool WIDE>
DAL_D Slopes<Arithmetic<S>> slopes_of_row(
    const ForwardBatch<S>& batch, const RowInput<Arithmetic<S>>& in, const RowSummary<Arithmetic<S>>& summary) {
  using A = Arithmetic<S>;
  const auto knob = [&](int k) { return knob_of<A>(batch.knobs, in.row, k); };
  const int objective = static_cast<int>(batch.objective);
  if constexpr (WIDE) {
    const A knobs[kMostKnobs] = {in.knobs[0], in.knobs[1], knob(2), knob(3)};
    return wide_slopes(objective, summary, knobs);
  }
  if (objective <= kGeneralizedCrossEntropy)
    return dynamics_aware(
        summary, in.knobs[0], in.knobs[1], batch.log_classes, objective == kDynamicsAwareHard);
  const LossAndSlope<A> found = loss_and_slope(
      objective, summary.target_log_prob, summary.max_log_prob, in.knobs[0], in.knobs[1], knob(2));
  return {found.loss, found.by_log_prob};
}

// Merged sums -> loss of the row and coefficients of its gradient. `writes`: who stores the rest.
template <class S, bool WIDE = false>
DAL_D AffineGradient<Arithmetic<S>> finish_row(
    const Forward<S>& args, std::int64_t row, const RowInput<Arithmetic<S>>& in,
    const RowSums<Arithmetic<S>>& sums, unsigned place, bool writes, Arithmetic<S>& loss) {
  using A = Arithmetic<S>;
  const ForwardBatch<S>& batch = args.batch;
  const RowSummary<A> summary = summarise(sums, in.target_logit, static_cast<A>(batch.logits.classes));
  AffineGradient<A> gradient;
  loss = 0;
  if (!in.ignored) {
    const Slopes<A> slopes = slopes_of_row<S, WIDE>(batch, in, summary);
    gradient = affine_gradient<WIDE>(sums, summary, slopes, in.weight * batch.gradient_scale);
    loss = in.weight * slopes.loss;
  }
  gradient.max = origin_of(sums.max);
  if (!writes) return gradient;
  if (args.reduction == kNone) batch.loss[row] = loss;
  if (batch.fields) {
    const auto put = [&](Field field, A value) { batch.fields[field * batch.logits.rows + row] = value; };
    put(kMax, gradient.max);
    put(kScale, gradient.A);
    put(kSlope, gradient.B);
    put(kTargetTerm, gradient.t);
    if (batch.prediction) batch.prediction[row] = class_at(place);
    if (WIDE || batch.prediction) {
      put(kArgmaxTerm, gradient.u);
      put(kTargetProb, in.ignored ? not_a_number<A>() : exponential(summary.target_log_prob));
      put(kEntropy, summary.entropy);
      // Of a row of -inf alone nothing is known, as of its entropy.
      put(kMaxProb, sums.sum > A(0) ? exponential(summary.max_log_prob) : not_a_number<A>());
    }
    if constexpr (WIDE) {
      put(kSquare, gradient.E);
      put(kConstant, gradient.D);
    }
  }
  return gradient;
}

// NaN for the gradient of each row that is not ignored, and for what it is made from again.
template <class S> DAL_D void spoil_counted_rows(const ForwardBatch<S>& batch, const Layout& layout) {
  using A = Arithmetic<S>;
  const std::int64_t rows = batch.logits.rows, classes = batch.logits.classes;
  for (std::int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    if (batch.target.ignored(row)) continue;
    if (batch.fields) batch.fields[kScale * rows + row] = not_a_number<A>();
    if (batch.gradient)
      for (std::int64_t j = 0; j < classes; ++j)
        narrow(not_a_number<A>(), batch.gradient[layout.at(row) + j * layout.class_stride]);
  }
}

// By all threads of a block, the values being those of the first. The gradient was divided by N so far. Where the true
// divisor is 0 no row counted, and the gradient stays 0; or their weights are all 0, and it is 0 / 0. Then the pace
// follows the call, where one is kept.
template <class S>
DAL_D void write_loss(const Forward<S>& args, double loss, double divisor) {
  using A = Arithmetic<S>;
  const bool mean = args.reduction == kMean;
  if (threadIdx.x == 0) {
    *args.batch.loss = static_cast<A>(mean ? loss / divisor : loss);
    const double rows = static_cast<double>(args.batch.logits.rows);
    *args.correction = static_cast<A>(!mean || divisor == 0 ? 1.0 : rows / divisor);
  }
  if (mean && args.batch.weight && __syncthreads_or(threadIdx.x == 0 && divisor == 0))
    spoil_counted_rows(args.batch, args.layouts.gradient);
  if (args.follow.pace) follow_call(args);
}

// The losses and weights of this block's rows (those of thread 0) join the others'. The last block adds all up in
// their order: the same bits whichever that is.
template <class S>
DAL_D void reduce_losses(
    const Forward<S>& args, Arithmetic<S> loss, Arithmetic<S> weight, unsigned block, unsigned blocks, int rows = 1) {
  if (args.reduction == kNone) return;
  if (blocks == 1) return write_loss(args, loss, weight);
  if (rows > 1 && args.learnt) leave_learnt(args, block, rows);
  if (threadIdx.x == 0) {
    args.partial[block] = loss;
    args.partial[blocks + block] = weight;
  }
  if (!is_last_block(args.ticket, blocks)) return;
  double losses = 0, weights = 0;
  for (unsigned i = threadIdx.x; i < blocks; i += blockDim.x) {
    losses += __ldcg(args.partial + i);
    weights += __ldcg(args.partial + blocks + i);
  }
  __shared__ double scratch[2][32];
  losses = across_block<Add>(losses, scratch[0], 0.0);
  weights = across_block<Add>(weights, scratch[1], 0.0);
  write_loss(args, losses, weights);
}

}  // namespace dal
