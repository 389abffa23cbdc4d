// What one pass over a row of logits leaves behind, and how two halves of a row are joined.
// Host and device code without torch: the CPU and CUDA kernels share this file.
// Included by formulas.h, and once more for vectors of rows: no include guard.

// Once a row. A GPU has instructions for float: off by 2^-22 where ln S is near 0, of which a rounded S costs 2^-24.
template <class A>
DAL_HD A exponential(A x) {
  using std::exp;
  return exp(x);
}
template <class A>
DAL_HD A logarithm(A x) {
  using std::log;
  return log(x);
}
#if defined(__CUDA_ARCH__)
DAL_HD float exponential(float x) { return __expf(x); }
DAL_HD float logarithm(float x) { return __logf(x); }
#endif
// `x` where that is true, else `y`: of a vector of rows each has its own answer, so that formulas do not branch by it.
template <class A>
DAL_HD A select(bool where, A x, A y) {
  return where ? x : y;
}

// With d = z - m:  m = max z,  S = sum e^d,  W = sum e^d d      (dal_kernels/slices.py is the long form)
// and, where a loss sums over all classes ("wide" losses),  D = sum d,  P = sum e^2d,  over so many classes.
template <class A>
struct RowSums {
  A max = -std::numeric_limits<Scalar<A>>::infinity();
  A sum = 0;
  A weighted = 0;
  A differences = 0;
  A squares = 0;
  Scalar<A> classes = 0;
};

template <class A>
DAL_HD RowSums<double> in_double(const RowSums<A>& sums) {
  return {sums.max, sums.sum, sums.weighted, sums.differences, sums.squares, sums.classes};
}

// Moves the sums to a new maximum: with s = m_old - m_new, r = e^s,  W <- r (W + S s),  S <- r S,  D <- D + C s,
// P <- r^2 P. A half in which every logit so far is -inf has S = 0 and stays as it is (-inf - -inf would be NaN).
template <class A>
DAL_HD RowSums<A> rebase(const RowSums<A>& sums, A new_max) {
  RowSums<A> moved = sums;
  moved.max = new_max;
  if (sums.sum == A(0) || sums.max == new_max) return moved;
  const A shift = sums.max - new_max;
  const A ratio = exponential(shift);
  moved.differences += sums.classes * shift;
  // e^s underflows to 0 while s is finite or -inf: the half then contributes nothing, not 0 * inf.
  if (ratio == A(0)) {
    moved.sum = sums.sum == sums.sum ? A(0) : sums.sum;
    moved.weighted = moved.squares = 0;
    return moved;
  }
  moved.sum = ratio * sums.sum;
  moved.weighted = ratio * (sums.weighted + sums.sum * shift);
  moved.squares = ratio * ratio * sums.squares;
  return moved;
}

template <class A>
DAL_HD RowSums<A> merge(const RowSums<A>& left, const RowSums<A>& right) {
  const A max = left.max > right.max ? left.max : right.max;
  const RowSums<A> l = rebase(left, max), r = rebase(right, max);
  return {max, l.sum + r.sum, l.weighted + r.weighted, l.differences + r.differences, l.squares + r.squares,
          l.classes + r.classes};
}

// What a loss may depend on: with p = softmax(z),  ln p_y,  the largest ln p_k,  the entropy,  sum ln p_k,  sum p_k^2.
template <class A>
struct RowSummary {
  A target_log_prob, max_log_prob, entropy, sum_log_prob, square_sum;
  Scalar<A> classes;
};

// ln p_j = z_j - m - ln S,   of the largest -ln S,   H = ln S - W / S,   G = D - C ln S,   Q = P / S^2
template <class A>
DAL_HD RowSummary<A> summarise(const RowSums<A>& sums, A target_logit, Scalar<A> classes) {
  const A log_sum = logarithm(sums.sum);
  return {target_logit - sums.max - log_sum,
          -log_sum,
          log_sum - sums.weighted / sums.sum,
          sums.differences - classes * log_sum,
          sums.squares / (sums.sum * sums.sum),
          classes};
}
