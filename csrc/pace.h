// The pace of DAL: what a network has learnt, and how far q may go for it. dal_kernels/pace.py has the reasons.
#pragma once

#include "format.h"

namespace dal {

// Float32 numbers side by side, the eight of PaceNumbers in pace.py.
struct Pace {
  float q, bootstrap_weight, confidence, agreement, calls, bound, q_start, opening;
};

struct PaceLimits {
  double q_end, max_weight;
};

// What a training call says of its rows, of which each `every`-th is looked at.
template <class A> struct PaceRows {
  const A *max_prob, *target_prob;
  const std::int64_t *prediction, *target;
  std::int64_t count, every;
};

struct Learnt {
  double confidence = 0, agreement = 0, rows = 0;

  template <class A> DAL_HD void add(const PaceRows<A>& from, std::int64_t row) {
    // Of an ignored row it is NaN, and of a row with a NaN among its logits.
    const bool counted = from.target_prob[row] == from.target_prob[row];
    confidence += counted ? static_cast<double>(from.max_prob[row]) : 0;
    agreement += counted && from.prediction[row] == from.target[row];
    rows += counted;
  }
  DAL_HD void add(const Learnt& other) {
    confidence += other.confidence;
    agreement += other.agreement;
    rows += other.rows;
  }
};

// The averages over calls follow one call. A call without rows leaves them where they are.
DAL_HD void follow(Pace& pace, const Learnt& call) {
  constexpr double kDecay = 0.95;
  if (call.rows == 0) return;
  pace.confidence += static_cast<float>((1 - kDecay) * (call.confidence / call.rows - pace.confidence));
  pace.agreement += static_cast<float>((1 - kDecay) * (call.agreement / call.rows - pace.agreement));
  pace.calls += 1;
}

DAL_HD double share(double value) { return fmin(fmax(value, 0.0), 1.0); }

// How far a network is unsure because of its labels: from 0, it is not, to 1.
DAL_HD double doubt(double confidence, double agreement, double calls) {
  constexpr double kCalls = 700, kFrom = 0.1, kRise = 0.1, kTo = 0.6, kFall = 0.2, kSlow = 1.3, kSlowness = 0.3;
  return share(calls / kCalls) * share((confidence - kFrom) / kRise) * share((kTo - confidence) / kFall) *
         share((kSlow - agreement / confidence) / kSlowness);
}

// q and the bootstrap weight from the averages and the bound.
DAL_HD void keep_pace(Pace& pace, const PaceLimits& limits) {
  constexpr double kLeast = 0.2, kSlope = 15, kTolerated = 0.12, kLogTen = 2.302585092994046;
  const double confidence = pace.confidence, agreement = pace.agreement, reach = limits.q_end * confidence;
  const double bracket = kLeast + kSlope * (1 - agreement / confidence);
  const double free = fmin(fmax(reach * bracket / (1 + kSlope * kTolerated * reach), kLeast * reach), reach);
  const double least = pace.q_start * fmax(static_cast<double>(pace.opening), doubt(confidence, agreement, pace.calls)) /
                       fmax(-log(confidence) / kLogTen, 1.0);
  const double q = fmin(static_cast<double>(pace.bound), fmax(least, free));
  pace.q = static_cast<float>(q);
  pace.bootstrap_weight = static_cast<float>(
      limits.q_end > 1 ? limits.max_weight * share((q - 1) / (limits.q_end - 1)) : 0.0);
}

}  // namespace dal
