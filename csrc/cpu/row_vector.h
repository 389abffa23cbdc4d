// A number of each of so many rows, for the formulas, which ask an arithmetic type for no more than this.
// Included once an instruction set, inside its namespace, after lanes.h: no include guard.

// Two vectors, because what is made of a row is one long chain of operations: of a single vector each of them would wait
// for the last, and the machine would do nothing meanwhile.
constexpr int kRows = 2 * kLanes<float>;

struct RowInts {
  IntVec<float> low, high;
  friend DAL_LANE RowInts operator&(RowInts x, RowInts y) { return {x.low & y.low, x.high & y.high}; }
  friend DAL_LANE RowInts operator|(RowInts x, RowInts y) { return {x.low | y.low, x.high | y.high}; }
  friend DAL_LANE RowInts operator*(RowInts x, RowInts y) { return {x.low * y.low, x.high * y.high}; }
  friend DAL_LANE RowInts operator==(RowInts x, RowInts y) { return {x.low == y.low, x.high == y.high}; }
  friend DAL_LANE RowInts operator<(RowInts x, RowInts y) { return {x.low < y.low, x.high < y.high}; }
};
using RowMask = RowInts;  // -1 where that is true, else 0
DAL_LANE RowInts row_ints(std::int32_t x) { return {IntVec<float>{} + x, IntVec<float>{} + x}; }

DAL_LANE RowInts load_ints(const std::int32_t* from) {
  RowInts ints;
  std::memcpy(&ints, from, sizeof(ints));
  return ints;
}

struct RowVector {
  using Scalar = float;
  Vec<float> low, high;

  RowVector() = default;
  DAL_LANE RowVector(Vec<float> low, Vec<float> high) : low(low), high(high) {}
  DAL_LANE RowVector(float x) : low(splat(x)), high(splat(x)) {}
  DAL_LANE RowVector& operator+=(RowVector x) { return *this = *this + x; }
  DAL_LANE RowVector& operator-=(RowVector x) { return *this = *this - x; }
  DAL_LANE RowVector& operator*=(RowVector x) { return *this = *this * x; }
  friend DAL_LANE RowVector operator-(RowVector x) { return {-x.low, -x.high}; }
  friend DAL_LANE RowVector operator+(RowVector x, RowVector y) { return {x.low + y.low, x.high + y.high}; }
  friend DAL_LANE RowVector operator-(RowVector x, RowVector y) { return {x.low - y.low, x.high - y.high}; }
  friend DAL_LANE RowVector operator*(RowVector x, RowVector y) { return {x.low * y.low, x.high * y.high}; }
  friend DAL_LANE RowVector operator/(RowVector x, RowVector y) { return {x.low / y.low, x.high / y.high}; }
  friend DAL_LANE RowMask operator==(RowVector x, RowVector y) { return {x.low == y.low, x.high == y.high}; }
  friend DAL_LANE RowMask operator!=(RowVector x, RowVector y) { return {x.low != y.low, x.high != y.high}; }
  friend DAL_LANE RowMask operator>(RowVector x, RowVector y) { return {x.low > y.low, x.high > y.high}; }
  friend DAL_LANE RowMask operator<=(RowVector x, RowVector y) { return {x.low <= y.low, x.high <= y.high}; }
};

DAL_LANE RowVector select(RowMask where, RowVector x, RowVector y) {
  return {where.low ? x.low : y.low, where.high ? x.high : y.high};
}
DAL_LANE RowInts select(RowMask where, RowInts x, RowInts y) {
  return {where.low ? x.low : y.low, where.high ? x.high : y.high};
}
// `x` where that is true, else 0. By its bits, because x86 has no quick choice of two numbers before AVX-512.
DAL_LANE Vec<float> kept_where(IntVec<float> where, Vec<float> x) {
#if DAL_VECTOR_BYTES == 64
  return where ? x : splat(0.0f);
#else
  return bits_as<Vec<float>>(where & bits_as<IntVec<float>>(x));
#endif
}
DAL_LANE RowVector kept_where(RowMask where, RowVector x) {
  return {kept_where(where.low, x.low), kept_where(where.high, x.high)};
}
DAL_LANE bool any(RowMask where) { return fold<Or, std::int32_t>(Or{}, where.low | where.high); }

DAL_LANE RowVector larger(RowVector best, RowVector x) {
  return {larger<float>(best.low, x.low), larger<float>(best.high, x.high)};
}
DAL_LANE RowVector at_least(RowVector x, float low) { return {at_least<float>(x.low, low), at_least<float>(x.high, low)}; }
// As exp_of, once a class; `exponential` once a row.
DAL_LANE RowVector exp_of(RowVector x) { return {exp_of<float>(x.low), exp_of<float>(x.high)}; }
// Of x < 89. What is below e^-88 is 0.
DAL_LANE RowVector exponential(RowVector x) {
  const RowVector d = at_least(x, Exp<float>::low);
  return {precise_exp_of(d.low), precise_exp_of(d.high)};
}
DAL_LANE RowVector logarithm(RowVector x) { return {log_of(x.low), log_of(x.high)}; }
// ln(1 + x) of x >= -1: the logarithm of what 1 + x is rounded to, and what the rest of x adds to it.
DAL_LANE RowVector log1p(RowVector x) {
  const RowVector sum = 1.0f + x;
  return logarithm(sum) + select(sum == 0.0f, 0.0f, (x - (sum - 1.0f)) / sum);
}
// x^y of x >= 0, to 2 |y ln x| + 3 ulp. What is below e^-88 is 0, and above e^88.4 infinite, because its exponent comes out
// as infinity's.
DAL_LANE RowVector pow(RowVector x, float y) {
  if (y == 0.0f) return 1.0f;
  const RowVector exponent = y * logarithm(x);
  return exponential(select(exponent > 89.0f, 89.0f, exponent));
}
DAL_LANE Vec<float> root_of(Vec<float> x) {
  for (int i = 0; i < kLanes<float>; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
DAL_LANE RowVector sqrt(RowVector x) { return {root_of(x.low), root_of(x.high)}; }
DAL_LANE RowVector expm1_nonpositive(RowVector x, RowVector power);
DAL_LANE RowVector arcsine_ratio(RowVector x);

namespace of_vectors {
#include "../row_sums.h"
#include "../affine_gradient.h"
#include "../probability_losses.h"
#include "../objective.h"
}  // namespace of_vectors

DAL_LANE RowVector expm1_nonpositive(RowVector x, RowVector power) {
  return select(x > -0.5f, of_vectors::expm1_series(x), power - 1.0f);
}
DAL_LANE RowVector arcsine_ratio(RowVector x) { return of_vectors::arcsine_ratio_series(x); }
