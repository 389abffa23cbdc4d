// The objective of a row on a GPU. DAL is made in place; every other loss is a call.
#pragma once

#include "../batch.h"
#include "element.cuh"

namespace dal {

// Once a row, and called: see Compact.
template <class A> __device__ __noinline__ A called_pow(A x, A y) { return pow(x, y); }
template <class A> __device__ __noinline__ A called_log1p(A x) { return log1p(x); }
template <class A> __device__ __noinline__ A called_expm1_nonpositive(A x, A power) {
  return expm1_nonpositive(x, power);
}
template <class A> __device__ __noinline__ A quotient(A x, A y) { return x / y; }
// In place: few instructions, off by 2 ulp at most.
DAL_D float quotient(float x, float y) { return __fdividef(x, y); }

// A number whose costly operations are calls. Each kernel holds its own copy of the losses of objective.h, because the
// compiler copies a called function into each kernel that calls it. With each power and logarithm in place, that copy
// would be as large as the rest of a kernel.
template <class A> struct Compact {
  A value;
  Compact() = default;
  template <class T> DAL_D Compact(T x) : value(static_cast<A>(x)) {}
  DAL_D Compact& operator+=(Compact x) { return *this = *this + x; }
  DAL_D Compact& operator-=(Compact x) { return *this = *this - x; }
  DAL_D Compact& operator*=(Compact x) { return *this = *this * x; }
  friend DAL_D Compact operator-(Compact x) { return -x.value; }
  friend DAL_D Compact operator+(Compact x, Compact y) { return x.value + y.value; }
  friend DAL_D Compact operator-(Compact x, Compact y) { return x.value - y.value; }
  friend DAL_D Compact operator*(Compact x, Compact y) { return x.value * y.value; }
  friend DAL_D Compact operator/(Compact x, Compact y) { return quotient(x.value, y.value); }
  friend DAL_D Compact operator/(Compact x, int y) { return x.value * (A(1) / static_cast<A>(y)); }
  friend DAL_D bool operator==(Compact x, Compact y) { return x.value == y.value; }
  friend DAL_D bool operator!=(Compact x, Compact y) { return x.value != y.value; }
  friend DAL_D bool operator<=(Compact x, Compact y) { return x.value <= y.value; }
  friend DAL_D Compact arcsine_ratio(Compact x) { return arcsine_ratio(x.value); }
  friend DAL_D Compact sqrt(Compact x) { return ::sqrt(x.value); }
  friend DAL_D Compact pow(Compact x, Compact y) { return called_pow(x.value, y.value); }
  friend DAL_D Compact log1p(Compact x) { return called_log1p(x.value); }
  friend DAL_D Compact expm1_nonpositive(Compact x, Compact power) {
    return called_expm1_nonpositive(x.value, power.value);
  }
};
template <class A> DAL_D Compact<A> exponential(Compact<A> x) { return exponential(x.value); }
template <class A> DAL_D Compact<A> logarithm(Compact<A> x) { return logarithm(x.value); }

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
