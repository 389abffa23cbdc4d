// What one pass over a row of logits leaves behind, and how two halves of a row are joined.
// Host and device code without torch: the CPU and CUDA kernels share this file.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define DAL_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DAL_HD inline __attribute__((always_inline))
#else
#define DAL_HD inline
#endif

namespace dal {

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

// m = max z,  S = sum e^(z-m),  W = sum e^(z-m) (z-m)      (dal_kernels/reference.py is the long form)
template <class A>
struct RowStats {
  A max = -std::numeric_limits<A>::infinity();
  A sum = 0;
  A weighted = 0;
};

// Moves (S, W) to a new maximum: with s = m_old - m_new,  W <- e^s (W + S s),  S <- e^s S.
// A half in which every logit so far is -inf has S = 0 and stays as it is (-inf - -inf would be NaN).
template <class A>
DAL_HD RowStats<A> rebase(const RowStats<A>& stats, A new_max) {
  if (stats.sum == A(0) || stats.max == new_max) return {new_max, stats.sum, stats.weighted};
  const A shift = stats.max - new_max;
  const A ratio = exponential(shift);
  // e^s underflows to 0 while s is finite or -inf: the half then contributes nothing, not 0 * inf.
  if (ratio == A(0)) return {new_max, stats.sum == stats.sum ? A(0) : stats.sum, A(0)};
  return {new_max, ratio * stats.sum, ratio * (stats.weighted + stats.sum * shift)};
}

template <class A>
DAL_HD RowStats<A> merge(const RowStats<A>& left, const RowStats<A>& right) {
  const A max = left.max > right.max ? left.max : right.max;
  const RowStats<A> l = rebase(left, max), r = rebase(right, max);
  return {max, l.sum + r.sum, l.weighted + r.weighted};
}

// ln p_j = z_j - m - ln S,   of the largest -ln S,   H = ln S - W / S
template <class A>
struct RowSummary {
  A target_log_prob, max_log_prob, entropy;
};

template <class A>
DAL_HD RowSummary<A> summarise(const RowStats<A>& stats, A target_logit) {
  const A log_sum = logarithm(stats.sum);
  return {target_logit - stats.max - log_sum, -log_sum, log_sum - stats.weighted / stats.sum};
}

}  // namespace dal
