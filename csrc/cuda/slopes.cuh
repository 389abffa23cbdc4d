// The objective of a row on a GPU. DAL is made in place; every other loss is a call.
#pragma once

#include "../batch.h"
#include "element.cuh"

namespace dal {

// A number whose costly operations are calls. A kernel holds a copy of the losses of objective.h, because a called
// function is compiled into each kernel that calls it; with every power, logarithm and division in place, a copy would be
// as large as a kernel.
template <class A> struct Compact {
  A value;
  Compact() = default;
  template <class T> DAL_D Compact(T x) : value(static_cast<A>(x)) {}
};
#define DAL_COMPACT_CALL(name, expression)                                                        \
  template <class A> __device__ __noinline__ A called_##name(A x, A y) { return expression; }
DAL_COMPACT_CALL(pow, ::pow(x, y))
DAL_COMPACT_CALL(log1p, ::log1p(x))
DAL_COMPACT_CALL(expm1, ::expm1(x))
DAL_COMPACT_CALL(expm1_nonpositive, expm1_nonpositive(x, y))
#undef DAL_COMPACT_CALL

// Off by 2 ulp at most where a float has an instruction for it.
DAL_D float quotient(float x, float y) { return __fdividef(x, y); }
static __device__ __noinline__ double quotient(double x, double y) { return x / y; }

#define DAL_COMPACT(type, name, expression) \
  template <class A> DAL_D type name { return expression; }
#define DAL_COMPACT_OPERATOR(type, symbol)                                                                       \
  template <class A> DAL_D type operator symbol(Compact<A> x, Compact<A> y) { return x.value symbol y.value; }   \
  template <class A> DAL_D type operator symbol(Compact<A> x, int y) { return x.value symbol static_cast<A>(y); } \
  template <class A> DAL_D type operator symbol(int x, Compact<A> y) { return static_cast<A>(x) symbol y.value; }
DAL_COMPACT_OPERATOR(Compact<A>, +)
DAL_COMPACT_OPERATOR(Compact<A>, -)
DAL_COMPACT_OPERATOR(Compact<A>, *)
DAL_COMPACT_OPERATOR(bool, ==)
DAL_COMPACT_OPERATOR(bool, !=)
DAL_COMPACT_OPERATOR(bool, <)
DAL_COMPACT_OPERATOR(bool, <=)
DAL_COMPACT_OPERATOR(bool, >=)
DAL_COMPACT(Compact<A>, operator-(Compact<A> x), -x.value)
DAL_COMPACT(Compact<A>&, operator+=(Compact<A>& x, Compact<A> y), x = x + y)
DAL_COMPACT(Compact<A>&, operator-=(Compact<A>& x, Compact<A> y), x = x - y)
DAL_COMPACT(Compact<A>&, operator*=(Compact<A>& x, Compact<A> y), x = x * y)
DAL_COMPACT(Compact<A>, operator/(Compact<A> x, Compact<A> y), quotient(x.value, y.value))
DAL_COMPACT(Compact<A>, operator/(Compact<A> x, int y), x.value * (A(1) / static_cast<A>(y)))
DAL_COMPACT(Compact<A>, pow(Compact<A> x, Compact<A> y), called_pow(x.value, y.value))
DAL_COMPACT(Compact<A>, log1p(Compact<A> x), called_log1p(x.value, x.value))
DAL_COMPACT(Compact<A>, expm1(Compact<A> x), called_expm1(x.value, x.value))
DAL_COMPACT(Compact<A>, acos(Compact<A> x), ::acos(x.value))
DAL_COMPACT(Compact<A>, sqrt(Compact<A> x), ::sqrt(x.value))
DAL_COMPACT(Compact<A>, logarithm(Compact<A> x), logarithm(x.value))
DAL_COMPACT(Compact<A>, exponential(Compact<A> x), exponential(x.value))
DAL_COMPACT(
    Compact<A>, expm1_nonpositive(Compact<A> x, Compact<A> power), called_expm1_nonpositive(x.value, power.value))
#undef DAL_COMPACT_OPERATOR
#undef DAL_COMPACT

// A loss and its slope by ln p_y: all that losses have which are neither DAL nor wide.
template <class A> struct LossAndSlope {
  A loss, by_log_prob;
};
template <class A>
__device__ __noinline__ LossAndSlope<A> loss_and_slope(
    int objective, A log_prob, A max_log_prob, A knob0, A knob1, A knob2) {
  if (objective <= kGeneralizedCrossEntropy || is_wide(objective)) return {A(0), A(0)};
  using C = Compact<A>;
  const C knobs[kMostKnobs] = {knob0, knob1, knob2, 0};
  const Slopes<C> slopes = slopes_of(objective, RowSummary<C>{log_prob, max_log_prob, 0, 0, 0, 1}, knobs, C(0));
  return {slopes.loss.value, slopes.by_log_prob.value};
}

// The same of wide losses, which have slopes by two sums too.
template <class A> DAL_D Slopes<A> wide_slopes(int objective, const RowSummary<A>& row, const A* given) {
  if (!is_wide(objective)) return {};
  using C = Compact<A>;
  const C knobs[kMostKnobs] = {given[0], given[1], given[2], given[3]};
  const Slopes<C> slopes = slopes_of(
      objective, RowSummary<C>{row.target_log_prob, 0, 0, row.sum_log_prob, row.square_sum, row.classes}, knobs, C(0));
  return {slopes.loss.value, slopes.by_log_prob.value, A(0), A(0), slopes.by_sum_log_prob.value,
          slopes.by_square_sum.value};
}

}  // namespace dal
