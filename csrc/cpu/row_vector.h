// A number of each of so many rows as a lane holds, for the formulas, which ask an arithmetic type for no more than this.
// Included once an instruction set, inside its namespace, after lanes.h: no include guard.

constexpr int kRows = kLanes<float>;  // in a vector

struct RowMask {
  IntVec<float> lanes;
};

struct RowVector {
  using Scalar = float;
  Vec<float> lanes;

  RowVector() = default;
  DAL_LANE RowVector(Vec<float> lanes) : lanes(lanes) {}
  DAL_LANE RowVector(float x) : lanes(splat(x)) {}
  DAL_LANE RowVector& operator+=(RowVector x) { lanes += x.lanes; return *this; }
  DAL_LANE RowVector& operator-=(RowVector x) { lanes -= x.lanes; return *this; }
  DAL_LANE RowVector& operator*=(RowVector x) { lanes *= x.lanes; return *this; }
  friend DAL_LANE RowVector operator-(RowVector x) { return -x.lanes; }
  friend DAL_LANE RowVector operator+(RowVector x, RowVector y) { return x.lanes + y.lanes; }
  friend DAL_LANE RowVector operator-(RowVector x, RowVector y) { return x.lanes - y.lanes; }
  friend DAL_LANE RowVector operator*(RowVector x, RowVector y) { return x.lanes * y.lanes; }
  friend DAL_LANE RowVector operator/(RowVector x, RowVector y) { return x.lanes / y.lanes; }
  friend DAL_LANE RowMask operator==(RowVector x, RowVector y) { return {x.lanes == y.lanes}; }
  friend DAL_LANE RowMask operator!=(RowVector x, RowVector y) { return {x.lanes != y.lanes}; }
  friend DAL_LANE RowMask operator>(RowVector x, RowVector y) { return {x.lanes > y.lanes}; }
  friend DAL_LANE RowMask operator<=(RowVector x, RowVector y) { return {x.lanes <= y.lanes}; }
};

DAL_LANE RowVector select(RowMask where, RowVector x, RowVector y) { return where.lanes ? x.lanes : y.lanes; }
// Of x <= 0. What is below e^-88 is 0.
DAL_LANE RowVector exponential(RowVector x) { return precise_exp_of(at_least<float>(x.lanes, Exp<float>::low)); }
DAL_LANE RowVector logarithm(RowVector x) { return log_of(x.lanes); }
DAL_LANE RowVector expm1_nonpositive(RowVector x, RowVector power);

namespace of_vectors {
#include "../row_sums.h"
#include "../affine_gradient.h"
#include "../probability_losses.h"
#include "../objective.h"
}  // namespace of_vectors

DAL_LANE RowVector expm1_nonpositive(RowVector x, RowVector power) {
  return select(x > -0.5f, of_vectors::expm1_series(x), power - 1.0f);
}
