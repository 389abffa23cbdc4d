// Losses of ln p_y alone, each with its slope by that. Host and device code; dal_kernels/objectives.py has the formulas.
// Included by formulas.h, and once more for vectors of rows: no include guard.

// e^x - 1 for -1/2 < x <= 0 in fp32: x (1 + x/2 (1 + x/3 (...))).
template <class A>
DAL_HD A expm1_series(A x) {
  A series = 1.0f;
  for (int k = 8; k > 1; --k) series = 1.0f + x * series * (1.0f / static_cast<float>(k));
  return x * series;
}

// e^x - 1 for x <= 0, given e^x. That difference keeps its digits below -1/2; above, the series does. In fp32 the
// library's expm1 would take longer than all the rest of a short row.
DAL_HD double expm1_nonpositive(double x, double) {
  using std::expm1;
  return expm1(x);
}
DAL_HD float expm1_nonpositive(float x, float power) {
  if (!(x > -0.5f)) return power - 1.0f;
  return expm1_series(x);
}

// (1 - p_y^q) / q, by expm1 because 1 - p^q keeps no digit near p = 1; q = 0 is cross-entropy. Its slope is -p_y^q.
template <class A>
DAL_HD Slopes<A> generalized_cross_entropy(A log_prob, Scalar<A> q) {
  Slopes<A> slopes{};
  if (q == Scalar<A>(0)) {
    slopes.loss = -log_prob;
    slopes.by_log_prob = A(-1);
    return slopes;
  }
  const A exponent = q * log_prob;
  const A power = exponential(exponent);
  slopes.loss = -expm1_nonpositive(exponent, power) / q;
  slopes.by_log_prob = -power;
  return slopes;
}

// 1 - p_y with its digits.
template <class A>
DAL_HD A miss_of(A log_prob, A prob) {
  return -expm1_nonpositive(log_prob, prob);
}

// sum of (1 - p)^i / i up to the order: its slope is the sum of a geometric series.
template <class A>
DAL_HD Slopes<A> taylor_cross_entropy(A log_prob, Scalar<A> order) {
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob);
  Slopes<A> slopes{};
  A power = 1;
  for (int i = 1; Scalar<A>(i) <= order; ++i) {
    slopes.by_log_prob -= prob * power;
    power *= miss;
    slopes.loss += power / Scalar<A>(i);
  }
  return slopes;
}

// ((a + 1)^q - (a + p)^q) / q, the first power taken out.
template <class A>
DAL_HD Slopes<A> asymmetric_power(A log_prob, Scalar<A> a, Scalar<A> q) {
  using std::log1p;
  using std::pow;
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob), exponent = q * log1p(-miss / (a + 1));
  Slopes<A> slopes{};
  slopes.loss = -pow(a + 1, q) * expm1_nonpositive(exponent, exponential(exponent)) / q;
  slopes.by_log_prob = -prob * pow(a + prob, q - 1);
  return slopes;
}

// ((a - p)^q - (a - 1)^q) / q, the first power taken out.
template <class A>
DAL_HD Slopes<A> asymmetric_unhinged(A log_prob, Scalar<A> a, Scalar<A> q) {
  using std::log1p;
  using std::pow;
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob);
  const Scalar<A> least = a - 1;
  const A exponent = -q * log1p(miss / least);
  Slopes<A> slopes{};
  slopes.loss = -pow(least + miss, q) * expm1_nonpositive(exponent, exponential(exponent)) / q;
  slopes.by_log_prob = -prob * pow(least + miss, q - 1);
  return slopes;
}

// Jensen-Shannon with m = p + pi (1 - p); p ln p -> 0 at p = 0. ln p - ln m by the ratio of the two where they are near,
// because for small pi nothing is left of that difference.
template <class A>
DAL_HD Slopes<A> jensen_shannon(A log_prob, Scalar<A> pi) {
  using std::log1p;
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob);
  const Scalar<A> rest = 1 - pi, log_rest = log1p(-pi);
  const A added = pi * miss, mean = prob + added;
  const A log_mean = select(mean <= A(0.5), logarithm(mean), log1p(-rest * miss));
  const A far = select(prob == A(0), A(0), prob * (log_prob - log_mean)), near = -prob * log1p(added / prob);
  const A of_target = select(prob <= added, far, near);
  Slopes<A> slopes{};
  slopes.loss = (-pi * log_mean - rest * miss * log_rest + rest * of_target) / (-rest * log_rest);
  slopes.by_log_prob = -(prob * log_rest + of_target) / log_rest;
  return slopes;
}

// arcsin(sqrt x) / sqrt x for 0 <= x <= 1/2 in fp32: minimax in relative error (2e-9), constant term 1.
template <class A>
DAL_HD A arcsine_ratio_series(A x) {
  constexpr float c[] = {0.126114339f,   -0.139967293f, 0.11032927f,  -0.00805743597f,
                         0.0359911434f,  0.0440817885f, 0.0750268251f, 0.166666225f};
  A series = c[0];
  for (int k = 1; k < 8; ++k) series = series * x + c[k];
  return series * x + 1.0f;
}
DAL_HD double arcsine_ratio(double x) {
  using std::asin;
  using std::sqrt;
  const double root = sqrt(x);
  return root > 0 ? asin(root) / root : 1;
}
DAL_HD float arcsine_ratio(float x) { return arcsine_ratio_series(x); }

// angle^2 with angle = arccos(sqrt p) = arcsin(sqrt(1 - p)); its slope is -angle / tan(angle). By the arcsine of the lesser
// of p and 1 - p, because arccos keeps no digit near p = 1.
template <class A>
DAL_HD Slopes<A> fisher_rao(A log_prob) {
  using std::sqrt;
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob), root = exponential(log_prob / 2);
  const auto unlikely = prob <= miss;
  const A ratio = arcsine_ratio(select(unlikely, prob, miss));
  const A angle = Scalar<A>(1.57079632679489661923) - root * ratio;
  Slopes<A> slopes{};
  slopes.loss = select(unlikely, angle * angle, miss * ratio * ratio);
  slopes.by_log_prob = -root * select(unlikely, angle / sqrt(miss), ratio);
  return slopes;
}

// -(1 - p)^gamma ln p; detached, the modulator counts as a constant in the gradient.
template <class A>
DAL_HD Slopes<A> focal(A log_prob, Scalar<A> gamma, bool detached) {
  using std::pow;
  const A prob = exponential(log_prob), miss = miss_of(log_prob, prob);
  const A modulator = gamma == Scalar<A>(0) ? A(1) : A(pow(miss, gamma));
  Slopes<A> slopes{};
  slopes.loss = select(modulator == A(0), A(0), -modulator * log_prob);
  slopes.by_log_prob = -modulator;
  // gamma (1 - p)^(gamma - 1) p ln p: ln p / (1 - p) is -1 where both vanish.
  if (!detached && gamma != Scalar<A>(0)) {
    const A ratio = select(miss == A(0), A(-1), log_prob / miss);
    slopes.by_log_prob += select(prob == A(0), A(0), gamma * modulator * prob * ratio);
  }
  return slopes;
}

// Cross-entropy above p = 1 / tau, its tangent below.
template <class A>
DAL_HD Slopes<A> partially_huberised(A log_prob, Scalar<A> tau) {
  const Scalar<A> log_tau = logarithm(tau);
  const auto below = log_prob <= -log_tau;
  const A scaled = tau * exponential(log_prob);
  Slopes<A> slopes{};
  slopes.loss = select(below, log_tau + 1 - scaled, -log_prob);
  slopes.by_log_prob = select(below, -scaled, A(-1));
  return slopes;
}
