// Row quantities -> loss of the row and its slopes. One small function a loss; how the row was read, and how its gradient
// is written, is none of this file's business. dal_kernels/objectives.py has the formulas alone, with their sources.
#pragma once

#include "row_sums.h"

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

// A loss of a row, and its derivatives by what it depends on.
template <class A>
struct Slopes {
  A loss = 0, by_log_prob = 0, by_entropy = 0, by_max_log_prob = 0, by_sum_log_prob = 0, by_square_sum = 0;
};
template <class A>
DAL_HD Slopes<A> operator+(const Slopes<A>& l, const Slopes<A>& r) {
  return {l.loss + r.loss,
          l.by_log_prob + r.by_log_prob,
          l.by_entropy + r.by_entropy,
          l.by_max_log_prob + r.by_max_log_prob,
          l.by_sum_log_prob + r.by_sum_log_prob,
          l.by_square_sum + r.by_square_sum};
}

// The losses by number: the ids of dal_kernels/objectives.py.
enum ObjectiveId : std::int64_t {
  kDynamicsAware,
  kDynamicsAwareHard,
  kGeneralizedCrossEntropy,
  kSymmetricCrossEntropy,
  kTaylorCrossEntropy,
  kAsymmetricGeneralizedCrossEntropy,
  kAsymmetricUnhinged,
  kAsymmetricExponential,
  kJensenShannon,
  kFisherRao,
  kFocal,
  kFocalDetached,
  kPartiallyHuberisedCrossEntropy,
  kSmoothedCrossEntropy,
  kNormalizedAndAbsolute,
  kNormalizedAndAsymmetric,
  kJointAsymmetric,
  kBrier,
  kEpsilonSoftmax,
  kObjectives
};
constexpr int kMostKnobs = 4;

// Whether the gradient has a term at the predicted class, and whether the loss sums over all classes.
DAL_HD bool needs_argmax(std::int64_t objective) { return objective == kDynamicsAwareHard; }
DAL_HD bool is_wide(std::int64_t objective) {
  return objective == kSmoothedCrossEntropy || objective == kNormalizedAndAbsolute ||
         objective == kNormalizedAndAsymmetric || objective == kJointAsymmetric || objective == kBrier;
}
// Nothing asks for W where the entropy's weight is 0.
template <class A>
DAL_HD bool needs_entropy(std::int64_t objective, const A* knobs) {
  return objective == kDynamicsAware && knobs[1] != A(0);
}

// (1 - p_y^q) / q, by expm1 because 1 - p^q keeps no digit near p = 1; q = 0 is cross-entropy. Its slope is -p_y^q.
template <class A>
DAL_HD Slopes<A> generalized_cross_entropy(const RowSummary<A>& row, A q) {
  Slopes<A> of{};
  if (q == A(0)) {
    of.loss = -row.target_log_prob;
    of.by_log_prob = A(-1);
    return of;
  }
  const A exponent = q * row.target_log_prob;
  const A power = exponential(exponent);
  of.loss = -expm1_nonpositive(exponent, power) / q;
  of.by_log_prob = -power;
  return of;
}

template <class A>
DAL_HD Slopes<A> soft_bootstrap(const RowSummary<A>& row, A n) {
  return {n * row.entropy, A(0), n, A(0), A(0), A(0)};
}
template <class A>
DAL_HD Slopes<A> hard_bootstrap(const RowSummary<A>& row, A n) {
  return {-n * row.max_log_prob, A(0), A(0), -n, A(0), A(0)};
}

// The same, and lambda / (q ln C) B(p), B being the entropy or, hard, -ln of the largest probability. (arXiv 2303.11562)
// The bootstrap term of a single class is 0: ln C = 0.
template <class A>
DAL_HD Slopes<A> dynamics_aware(const RowSummary<A>& row, A q, A bootstrap_weight, A log_classes, bool hard) {
  const Slopes<A> fit = generalized_cross_entropy(row, q);
  if (bootstrap_weight == A(0) || log_classes == A(0)) return fit;
  const A n = bootstrap_weight / (q * log_classes);
  return fit + (hard ? hard_bootstrap(row, n) : soft_bootstrap(row, n));
}

// 1 - p_y with its digits.
template <class A>
DAL_HD A miss_of(A log_prob, A prob) {
  return -expm1_nonpositive(log_prob, prob);
}

// sum of (1 - p)^i / i up to the order: its slope is the sum of a geometric series.
template <class A>
DAL_HD Slopes<A> taylor_cross_entropy(A log_prob, A order) {
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob);
  Slopes<A> of{};
  A power = 1;
  for (int i = 1; A(i) <= order; ++i) {
    of.by_log_prob -= prob * power;
    power *= miss;
    of.loss += power / A(i);
  }
  return of;
}

// ((a + 1)^q - (a + p)^q) / q, the first power taken out.
template <class A>
DAL_HD Slopes<A> asymmetric_power(A log_prob, A a, A q) {
  using std::expm1;
  using std::log1p;
  using std::pow;
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob);
  Slopes<A> of{};
  of.loss = -pow(a + 1, q) * expm1(q * log1p(-miss / (a + 1))) / q;
  of.by_log_prob = -prob * pow(a + prob, q - 1);
  return of;
}

// ((a - p)^q - (a - 1)^q) / q, the second power taken out.
template <class A>
DAL_HD Slopes<A> asymmetric_unhinged(A log_prob, A a, A q) {
  using std::expm1;
  using std::log1p;
  using std::pow;
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob), least = a - 1;
  Slopes<A> of{};
  of.loss = pow(least, q) * expm1(q * log1p(miss / least)) / q;
  of.by_log_prob = -prob * pow(least + miss, q - 1);
  return of;
}

// Jensen-Shannon with m = pi + (1 - pi) p; p ln p -> 0 at p = 0.
template <class A>
DAL_HD Slopes<A> jensen_shannon(A log_prob, A pi) {
  using std::log1p;
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob), rest = 1 - pi;
  const A log_rest = log1p(-pi), log_mean = log1p(-rest * miss);
  const A of_target = prob == A(0) ? A(0) : prob * (log_prob - log_mean);
  Slopes<A> of{};
  of.loss = (-pi * log_mean - rest * miss * log_rest + rest * of_target) / (-rest * log_rest);
  of.by_log_prob = -(prob * log_rest + of_target) / log_rest;
  return of;
}

// arccos(sqrt p)^2. With x = 1 - p it is x + x^2/3 + 8 x^3/45 + ...; its slope is -angle / tan(angle).
template <class A>
DAL_HD Slopes<A> fisher_rao(A log_prob) {
  using std::acos;
  using std::sqrt;
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob);
  Slopes<A> of{};
  if (miss < A(0.03)) {
    A coefficient = 2, power = 1, slope = 0;
    for (int n = 1; n < 13; ++n) {
      slope += coefficient / A(2 * n) * power;
      power *= miss;
      of.loss += coefficient / A(2 * n * n) * power;
      coefficient *= A(2 * n + 2) / A(2 * n + 1);
    }
    of.by_log_prob = -prob * slope;
    return of;
  }
  const A root = exponential(log_prob / 2), angle = acos(root);
  of.loss = angle * angle;
  of.by_log_prob = -angle * root / sqrt(miss);
  return of;
}

// -(1 - p)^gamma ln p; detached, the modulator counts as a constant in the gradient.
template <class A>
DAL_HD Slopes<A> focal(A log_prob, A gamma, bool detached) {
  using std::pow;
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob);
  const A modulator = gamma == A(0) ? A(1) : pow(miss, gamma);
  Slopes<A> of{};
  of.loss = modulator == A(0) ? A(0) : -modulator * log_prob;
  of.by_log_prob = -modulator;
  // gamma (1 - p)^(gamma - 1) p ln p: ln p / (1 - p) is -1 where both vanish.
  if (!detached && gamma != A(0)) {
    const A ratio = miss == A(0) ? A(-1) : log_prob / miss;
    if (prob != A(0)) of.by_log_prob += gamma * modulator * prob * ratio;
  }
  return of;
}

// Cross-entropy above p = 1 / tau, its tangent below.
template <class A>
DAL_HD Slopes<A> partially_huberised(A log_prob, A tau) {
  const A log_tau = logarithm(tau);
  Slopes<A> of{};
  if (log_prob <= -log_tau) {
    const A scaled = tau * exponential(log_prob);
    of.loss = log_tau + 1 - scaled;
    of.by_log_prob = -scaled;
  } else {
    of.loss = -log_prob;
    of.by_log_prob = A(-1);
  }
  return of;
}

template <class A>
DAL_HD Slopes<A> smoothed_cross_entropy(const RowSummary<A>& row, A smoothing) {
  Slopes<A> of{};
  const A own = 1 - smoothing, each = smoothing / row.classes;
  of.loss = (own == A(0) ? A(0) : -own * row.target_log_prob) - (each == A(0) ? A(0) : each * row.sum_log_prob);
  of.by_log_prob = -own;
  of.by_sum_log_prob = -each;
  return of;
}

// Adds weight * l / G: 1 for a single class; 0, and flat, where another class has probability 0 (G = -inf).
template <class A>
DAL_HD void add_normalized(Slopes<A>& of, const RowSummary<A>& row, A weight) {
  const A total = row.sum_log_prob;
  if (total == A(0)) {
    of.loss += weight;
    return;
  }
  const A quotient = row.target_log_prob / total;
  of.loss += weight * quotient;
  of.by_log_prob += weight / total;
  of.by_sum_log_prob -= weight * quotient / total;
}

// Adds weight * (1 - p).
template <class A>
DAL_HD void add_absolute(Slopes<A>& of, A log_prob, A weight) {
  const A prob = exponential(log_prob);
  of.loss += weight * miss_of(log_prob, prob);
  of.by_log_prob -= weight * prob;
}

// Adds weight * (Q - 2 a p).
template <class A>
DAL_HD void add_squares(Slopes<A>& of, const RowSummary<A>& row, A weight, A a) {
  const A prob = exponential(row.target_log_prob);
  of.loss += weight * (row.square_sum - 2 * a * prob);
  of.by_log_prob -= weight * 2 * a * prob;
  of.by_square_sum += weight;
}

// Cross-entropy of (p + m e_k) / (1 + m), k the predicted class, and mean absolute error of p.
template <class A>
DAL_HD Slopes<A> epsilon_softmax(const RowSummary<A>& row, A m, A alpha, A beta) {
  using std::log1p;
  const A log_prob = row.target_log_prob;
  Slopes<A> of{};
  if (alpha != A(0)) {
    if (log_prob >= row.max_log_prob) {
      const A prob = exponential(log_prob);
      of.loss = -alpha * log1p(-miss_of(log_prob, prob) / (1 + m));
      of.by_log_prob = -alpha * prob / (prob + m);
    } else {
      of.loss = alpha * (log1p(m) - log_prob);
      of.by_log_prob = -alpha;
    }
  }
  add_absolute(of, log_prob, beta);
  return of;
}

// The loss of a row by its number. Chosen once a row: a kernel compiled for each loss would make the library many times
// as large.
template <class A>
DAL_HD Slopes<A> slopes_of(std::int64_t objective, const RowSummary<A>& row, const A* knobs, A log_classes) {
  const A log_prob = row.target_log_prob;
  Slopes<A> of{};
  switch (objective) {
    case kDynamicsAware:
    case kDynamicsAwareHard:
      return dynamics_aware(row, knobs[0], knobs[1], log_classes, objective == kDynamicsAwareHard);
    case kGeneralizedCrossEntropy: return generalized_cross_entropy(row, knobs[0]);
    case kSymmetricCrossEntropy:
      if (knobs[0] != A(0)) of.loss = -knobs[0] * log_prob;
      of.by_log_prob = -knobs[0];
      add_absolute(of, log_prob, knobs[1]);
      return of;
    case kTaylorCrossEntropy: return taylor_cross_entropy(log_prob, knobs[0]);
    case kAsymmetricGeneralizedCrossEntropy: return asymmetric_power(log_prob, knobs[0], knobs[1]);
    case kAsymmetricUnhinged: return asymmetric_unhinged(log_prob, knobs[0], knobs[1]);
    case kAsymmetricExponential: {
      const A prob = exponential(log_prob);
      of.loss = exponential(-prob / knobs[0]);
      of.by_log_prob = -of.loss * prob / knobs[0];
      return of;
    }
    case kJensenShannon: return jensen_shannon(log_prob, knobs[0]);
    case kFisherRao: return fisher_rao(log_prob);
    case kFocal: return focal(log_prob, knobs[0], false);
    case kFocalDetached: return focal(log_prob, knobs[0], true);
    case kPartiallyHuberisedCrossEntropy: return partially_huberised(log_prob, knobs[0]);
    case kSmoothedCrossEntropy: return smoothed_cross_entropy(row, knobs[0]);
    case kNormalizedAndAbsolute:
      add_normalized(of, row, knobs[0]);
      add_absolute(of, log_prob, knobs[1]);
      return of;
    case kNormalizedAndAsymmetric: {
      of = asymmetric_power(log_prob, knobs[2], knobs[3]);
      of.loss *= knobs[1];
      of.by_log_prob *= knobs[1];
      add_normalized(of, row, knobs[0]);
      return of;
    }
    case kJointAsymmetric: {
      const A weight = knobs[1] / row.classes;
      of.loss = weight * knobs[2] * knobs[2];
      add_squares(of, row, weight, knobs[2]);
      add_normalized(of, row, knobs[0]);
      return of;
    }
    case kBrier:
      of.loss = 1;
      add_squares(of, row, A(1), A(1));
      return of;
    case kEpsilonSoftmax: return epsilon_softmax(row, knobs[0], knobs[1], knobs[2]);
  }
  return of;
}

// Every loss here has the gradient
//   dL/dz_j = p_j (a + b (ln p_j + H) + c p_j) + d - t [j = y] - u [j = argmax z]
//   a = -(L_l + L_M + C L_G + 2 Q L_Q),  b = -L_H,  c = 2 L_Q,  d = L_G,  t = -L_l,  u = -L_M
// H stands beside ln p_j because the two cancel: ln p_j + H = (z_j - m) - W / S, without a rounded ln S in between.
// In what a kernel has at hand, e_j = e^(z_j - m):
//   dL/dz_j = e_j (A + B (z_j - m) + E e_j) + D - t [j = y] - u [j = argmax z]
//   A = (a - b W / S) / S,  B = b / S,  E = c / S^2,  D = d
template <class T>
struct AffineGradient {
  T max = 0, A = 0, B = 0, t = 0, u = 0, E = 0, D = 0;
};

// WIDE: of a loss that may have E and D. The others are spared what is 0.
template <bool WIDE, class T>
DAL_HD AffineGradient<T> affine_gradient(
    const RowSums<T>& sums, const RowSummary<T>& row, const Slopes<T>& slopes, T scale) {
  T a = -(slopes.by_log_prob + slopes.by_max_log_prob);
  const T b = -slopes.by_entropy;
  AffineGradient<T> gradient{};
  if (WIDE) {
    a -= row.classes * slopes.by_sum_log_prob;
    if (slopes.by_square_sum != T(0)) a -= 2 * row.square_sum * slopes.by_square_sum;
    gradient.E = scale * 2 * slopes.by_square_sum / (sums.sum * sums.sum);
    gradient.D = scale * slopes.by_sum_log_prob;
  }
  gradient.max = sums.max;
  gradient.A = scale * (a - b * (sums.weighted / sums.sum)) / sums.sum;
  gradient.B = scale * b / sums.sum;
  gradient.t = -scale * slopes.by_log_prob;
  gradient.u = -scale * slopes.by_max_log_prob;
  return gradient;
}

}  // namespace dal
