// What a row kernel is given: plain pointers, no torch. Host and device code.
#pragma once

#include "format.h"

namespace dal {

// The knobs of a loss, (K,) for all rows (stride 0) or (N, K).
struct Knobs {
  const void* data;
  bool is_double;
  int count;
  std::int64_t stride;
  template <class A>
  DAL_HD A at(std::int64_t row, int knob) const {
    return is_double ? static_cast<A>(static_cast<const double*>(data)[row * stride + knob])
                     : static_cast<A>(static_cast<const float*>(data)[row * stride + knob]);
  }
};

template <class Storage>
struct Logits {
  const Storage* data;
  std::int64_t rows, classes, row_stride;  // class stride 1
  DAL_HD const Storage* row(std::int64_t i) const { return data + i * row_stride; }
};

// Where rows lie: row n * inner + s begins at n * outer_stride + s * inner_stride, as of logits (N, C, S).
struct Layout {
  std::int64_t inner, outer_stride, inner_stride, class_stride;
  // A division takes longer than much of a row.
  DAL_HD std::int64_t at(std::int64_t row) const {
    return row < inner ? row * inner_stride : row / inner * outer_stride + row % inner * inner_stride;
  }
};
struct Layouts {
  Layout logits, gradient;
};

struct Target {
  const std::int64_t* data;
  std::int64_t stride, ignore_index;
  DAL_HD std::int64_t at(std::int64_t row) const { return data[row * stride]; }
  DAL_HD bool ignored(std::int64_t row) const { return at(row) == ignore_index; }
};

enum Reduction : std::int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Fields of one row that outlive the forward: field-major. The first four make the gradient of most losses, five where it
// has a term at the predicted class; of wide losses the last two do too, and then there are all.
enum Field {
  kMax, kScale, kSlope, kTargetTerm, kArgmaxTerm, kTargetProb, kEntropy, kMaxProb, kSquare, kConstant, kFields
};
constexpr int kGradientFields = 4, kNarrowFields = 8;

template <class Storage>
struct ForwardBatch {
  using A = Arithmetic<Storage>;
  Logits<Storage> logits;
  Target target;
  Knobs knobs;
  const A* weight;  // (C,) or null
  std::int64_t weight_stride;
  std::int64_t objective;
  A gradient_scale;  // 1 / divisor
  A log_classes;     // ln C
  A* loss;           // (N,)
  Storage* gradient;         // (N, C) contiguous or null
  A* fields;                 // (kNarrowFields, N), of wide losses (kFields, N), or null
  std::int64_t* prediction;  // (N,) or null
};

// Sums of rows alone.
template <class Storage>
struct SumsBatch {
  using A = Arithmetic<Storage>;
  Logits<Storage> logits;
  bool wide;
  A* sums;               // (3, N): m, S, W of row_sums.h; with `wide` (5, N): D, P too
  std::int64_t* argmax;  // (N,) or null
};

template <class Storage>
struct BackwardBatch {
  using A = Arithmetic<Storage>;
  Logits<Storage> logits;
  Target target;
  const A* fields;
  const std::int64_t* prediction;  // (N,) or null: no term at the predicted class
  bool wide;                       // fields have E and D
  const A* upstream;
  std::int64_t upstream_stride;
  Storage* gradient;
};

}  // namespace dal
