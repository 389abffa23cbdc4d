// What a row kernel is given: plain pointers, no torch. Host and device code.
#pragma once

#include "format.h"

namespace dal {

// A schedule value: one for all rows (stride 0) or one a row.
struct Knob {
  const void* data;
  bool is_double;
  std::int64_t stride;
  template <class A>
  DAL_HD A at(std::int64_t row) const {
    return is_double ? static_cast<A>(static_cast<const double*>(data)[row * stride])
                     : static_cast<A>(static_cast<const float*>(data)[row * stride]);
  }
};

template <class Storage>
struct Logits {
  const Storage* data;
  std::int64_t rows, classes, row_stride;  // class stride 1
  DAL_HD const Storage* row(std::int64_t i) const { return data + i * row_stride; }
};

struct Target {
  const std::int64_t* data;
  std::int64_t stride, ignore_index;
  DAL_HD std::int64_t at(std::int64_t row) const { return data[row * stride]; }
  DAL_HD bool ignored(std::int64_t row) const { return at(row) == ignore_index; }
};

enum Reduction : std::int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Fields of one row that outlive the forward: field-major. The first four make its gradient, with a hard bootstrap five.
enum Field { kMax, kScale, kSlope, kTargetTerm, kArgmaxTerm, kTargetProb, kEntropy, kFields };
constexpr int kGradientFields = 4;

template <class Storage>
struct ForwardBatch {
  using A = Arithmetic<Storage>;
  Logits<Storage> logits;
  Target target;
  Knob q, bootstrap_weight;
  const A* weight;  // (C,) or null
  std::int64_t weight_stride;
  bool hard;
  A gradient_scale;  // 1 / divisor
  A log_classes;     // ln C
  A* loss;           // (N,)
  Storage* gradient;         // (N, C) contiguous or null
  A* fields;                 // (kFields, N) or null
  std::int64_t* prediction;  // (N,) or null
};

template <class Storage>
struct BackwardBatch {
  using A = Arithmetic<Storage>;
  Logits<Storage> logits;
  Target target;
  const A* fields;
  const std::int64_t* prediction;  // (N,) or null: no hard bootstrap
  const A* upstream;
  std::int64_t upstream_stride;
  Storage* gradient;
};

}  // namespace dal
