// Row quantities -> loss of the row and its slopes: the losses by number, and those that need more than p_y. One small
// function a loss; how the row was read, and how its gradient is written, is none of this file's business.
// dal_kernels/objectives.py has the formulas alone, with their sources.
// Included by formulas.h, and once more for vectors of rows: no include guard.

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

template <class A>
DAL_HD Slopes<A> soft_bootstrap(const RowSummary<A>& row, Scalar<A> n) {
  return {n * row.entropy, A(0), A(n), A(0), A(0), A(0)};
}
template <class A>
DAL_HD Slopes<A> hard_bootstrap(const RowSummary<A>& row, Scalar<A> n) {
  return {-n * row.max_log_prob, A(0), A(0), A(-n), A(0), A(0)};
}

// Generalised cross-entropy, and lambda / (q ln C) B(p), B being the entropy or, hard, -ln of the largest probability. (arXiv 2303.11562)
// The bootstrap term of a single class is 0: ln C = 0.
template <class A>
DAL_HD Slopes<A> dynamics_aware(
    const RowSummary<A>& row, Scalar<A> q, Scalar<A> bootstrap_weight, Scalar<A> log_classes, bool hard) {
  const Slopes<A> fit = generalized_cross_entropy(row.target_log_prob, q);
  if (bootstrap_weight == Scalar<A>(0) || log_classes == Scalar<A>(0)) return fit;
  const Scalar<A> n = bootstrap_weight / (q * log_classes);
  return fit + (hard ? hard_bootstrap(row, n) : soft_bootstrap(row, n));
}

template <class A>
DAL_HD Slopes<A> smoothed_cross_entropy(const RowSummary<A>& row, Scalar<A> smoothing) {
  Slopes<A> slopes{};
  const Scalar<A> own = 1 - smoothing, each = smoothing / row.classes, none = 0;
  slopes.loss = (own == none ? A(0) : -own * row.target_log_prob) - (each == none ? A(0) : each * row.sum_log_prob);
  slopes.by_log_prob = -own;
  slopes.by_sum_log_prob = -each;
  return slopes;
}

// Adds weight * l / G: 1 for a single class; 0, and flat, where another class has probability 0 (G = -inf).
template <class A>
DAL_HD void add_normalized(Slopes<A>& slopes, const RowSummary<A>& row, Scalar<A> weight) {
  const A total = row.sum_log_prob;
  const auto single = total == A(0);
  const A quotient = row.target_log_prob / total;
  slopes.loss += select(single, A(weight), weight * quotient);
  slopes.by_log_prob += select(single, A(0), weight / total);
  slopes.by_sum_log_prob -= select(single, A(0), weight * quotient / total);
}

// Adds weight * (1 - p).
template <class A>
DAL_HD void add_absolute(Slopes<A>& slopes, A log_prob, Scalar<A> weight) {
  const A prob = exponential(log_prob);
  slopes.loss += weight * miss_of(log_prob, prob);
  slopes.by_log_prob -= weight * prob;
}

// Adds weight * (Q - 2 a p).
template <class A>
DAL_HD void add_squares(Slopes<A>& slopes, const RowSummary<A>& row, Scalar<A> weight, Scalar<A> a) {
  const A prob = exponential(row.target_log_prob);
  slopes.loss += weight * (row.square_sum - 2 * a * prob);
  slopes.by_log_prob -= weight * 2 * a * prob;
  slopes.by_square_sum += weight;
}

// Cross-entropy of (p + m e_k) / (1 + m), k the predicted class, and mean absolute error of p.
template <class A>
DAL_HD Slopes<A> epsilon_softmax(const RowSummary<A>& row, Scalar<A> m, Scalar<A> alpha, Scalar<A> beta) {
  using std::log1p;
  const A log_prob = row.target_log_prob;
  Slopes<A> slopes{};
  if (alpha != Scalar<A>(0)) {
    const A prob = exponential(log_prob);
    const auto predicted = row.max_log_prob <= log_prob;
    slopes.loss = alpha * select(predicted, -log1p(-miss_of(log_prob, prob) / (1 + m)), log1p(m) - log_prob);
    slopes.by_log_prob = -alpha * select(predicted, prob / (prob + m), A(1));
  }
  add_absolute(slopes, log_prob, beta);
  return slopes;
}

// The loss of one row by its number, or of a vector of rows. Chosen once a row: a kernel compiled for each loss would make
// the library many times as large.
template <class A>
DAL_HD Slopes<A> slopes_of(
    std::int64_t objective, const RowSummary<A>& row, const Scalar<A>* knobs, Scalar<A> log_classes) {
  const A log_prob = row.target_log_prob;
  Slopes<A> slopes{};
  switch (objective) {
    case kDynamicsAware:
    case kDynamicsAwareHard:
      slopes = dynamics_aware(row, knobs[0], knobs[1], log_classes, objective == kDynamicsAwareHard);
      break;
    case kGeneralizedCrossEntropy: slopes = generalized_cross_entropy(log_prob, knobs[0]); break;
    case kSymmetricCrossEntropy:
      if (knobs[0] != Scalar<A>(0)) slopes.loss = -knobs[0] * log_prob;
      slopes.by_log_prob = -knobs[0];
      add_absolute(slopes, log_prob, knobs[1]);
      break;
    case kTaylorCrossEntropy: slopes = taylor_cross_entropy(log_prob, knobs[0]); break;
    case kAsymmetricGeneralizedCrossEntropy: slopes = asymmetric_power(log_prob, knobs[0], knobs[1]); break;
    case kAsymmetricUnhinged: slopes = asymmetric_unhinged(log_prob, knobs[0], knobs[1]); break;
    case kAsymmetricExponential: {
      const A prob = exponential(log_prob);
      slopes.loss = exponential(-prob / knobs[0]);
      slopes.by_log_prob = -slopes.loss * prob / knobs[0];
      break;
    }
    case kJensenShannon: slopes = jensen_shannon(log_prob, knobs[0]); break;
    case kFisherRao: slopes = fisher_rao(log_prob); break;
    case kFocal: slopes = focal(log_prob, knobs[0], false); break;
    case kFocalDetached: slopes = focal(log_prob, knobs[0], true); break;
    case kPartiallyHuberisedCrossEntropy: slopes = partially_huberised(log_prob, knobs[0]); break;
    case kSmoothedCrossEntropy: slopes = smoothed_cross_entropy(row, knobs[0]); break;
    case kNormalizedAndAbsolute:
      add_normalized(slopes, row, knobs[0]);
      add_absolute(slopes, log_prob, knobs[1]);
      break;
    case kNormalizedAndAsymmetric:
      slopes = asymmetric_power(log_prob, knobs[2], knobs[3]);
      slopes.loss *= knobs[1];
      slopes.by_log_prob *= knobs[1];
      add_normalized(slopes, row, knobs[0]);
      break;
    case kJointAsymmetric: {
      const Scalar<A> weight = knobs[1] / row.classes;
      slopes.loss = weight * knobs[2] * knobs[2];
      add_squares(slopes, row, weight, knobs[2]);
      add_normalized(slopes, row, knobs[0]);
      break;
    }
    case kBrier:
      slopes.loss = 1;
      add_squares(slopes, row, Scalar<A>(1), Scalar<A>(1));
      break;
    case kEpsilonSoftmax: slopes = epsilon_softmax(row, knobs[0], knobs[1], knobs[2]); break;
  }
  return slopes;
}
