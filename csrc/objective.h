// Row statistics -> loss of the row and the coefficients of its gradient. One small function a term;
// how the row was read, and how its gradient is written, is none of this file's business.
#pragma once

#include "row_stats.h"

namespace dal {

// e^x - 1 for x <= 0, given e^x. That difference keeps its digits below -1/2; above, x (1 + x/2 (1 + x/3 (...))) does.
// In fp32 the library's expm1 would take longer than all the rest of a short row.
DAL_HD double expm1_nonpositive(double x, double) {
  using std::expm1;
  return expm1(x);
}
DAL_HD float expm1_nonpositive(float x, float power) {
  if (!(x > -0.5f)) return power - 1.0f;
  float series = 1.0f;
  for (int k = 8; k > 1; --k) series = 1.0f + x * series * (1.0f / static_cast<float>(k));
  return x * series;
}

// Every loss here has the gradient  dL/dz_j = p_j (a + b (ln p_j + H)) - t [j = y] - u [j = argmax z].
// H stands beside ln p_j because the two cancel: ln p_j + H = (z_j - m) - W / S, without a rounded ln S in between.
template <class A>
struct Objective {
  A loss = 0, a = 0, b = 0, t = 0, u = 0;
};

template <class A>
DAL_HD Objective<A> operator+(const Objective<A>& l, const Objective<A>& r) {
  return {l.loss + r.loss, l.a + r.a, l.b + r.b, l.t + r.t, l.u + r.u};
}

// L = (1 - p_y^q) / q, by expm1 because 1 - p^q keeps no digit near p = 1; q = 0 is cross-entropy.
// a = t = p_y^q
template <class A>
DAL_HD Objective<A> generalized_cross_entropy(const RowSummary<A>& row, A q) {
  if (q == A(0)) return {-row.target_log_prob, A(1), A(0), A(1), A(0)};
  const A exponent = q * row.target_log_prob;
  const A power = exponential(exponent);
  return {-expm1_nonpositive(exponent, power) / q, power, A(0), power, A(0)};
}

// L = n H,  b = -n
template <class A>
DAL_HD Objective<A> soft_bootstrap(const RowSummary<A>& row, A n) {
  return {n * row.entropy, A(0), -n, A(0), A(0)};
}

// L = -n ln p_argmax,  a = u = n
template <class A>
DAL_HD Objective<A> hard_bootstrap(const RowSummary<A>& row, A n) {
  return {-n * row.max_log_prob, n, A(0), A(0), n};
}

// L = (1 - p_y^q) / q + lambda / (q ln C) B(p)                         (arXiv 2303.11562)
// The bootstrap term of a single class is 0: ln C = 0.
template <class A>
DAL_HD Objective<A> dynamics_aware(
    const RowSummary<A>& row, A q, A bootstrap_weight, A log_classes, bool hard) {
  const Objective<A> fit = generalized_cross_entropy(row, q);
  if (bootstrap_weight == A(0) || log_classes == A(0)) return fit;
  const A n = bootstrap_weight / (q * log_classes);
  return fit + (hard ? hard_bootstrap(row, n) : soft_bootstrap(row, n));
}

// The same gradient in what a kernel has at hand, e_j = e^(z_j - m):
//   dL/dz_j = e_j (A + B (z_j - m)) - t [j = y] - u [j = argmax z],   A = (a - b W / S) / S,  B = b / S
template <class T>
struct AffineGradient {
  T max = 0, A = 0, B = 0, t = 0, u = 0;
};

template <class T>
DAL_HD AffineGradient<T> affine_gradient(
    const RowStats<T>& stats, const Objective<T>& objective, T scale) {
  return {
      stats.max,
      scale * (objective.a - objective.b * (stats.weighted / stats.sum)) / stats.sum,
      scale * objective.b / stats.sum,
      scale * objective.t,
      scale * objective.u};
}

}  // namespace dal
