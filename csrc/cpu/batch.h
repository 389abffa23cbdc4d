// What a CPU row kernel is given: plain pointers, no torch.
#pragma once

#include <algorithm>

#include "format.h"

namespace dal {

// Statistics are taken block by block and merged in order, so that a row gives the same bits whether one
// thread reads all of it or several share it. 4096 floats and their exponentials fit a 48 KiB L1 together.
constexpr std::int64_t kBlock = 4096;

// A schedule value: one for all rows (stride 0) or one a row.
struct Knob {
  const void* data;
  bool is_double;
  std::int64_t stride;
  double at(std::int64_t row) const {
    return is_double ? static_cast<const double*>(data)[row * stride]
                     : static_cast<double>(static_cast<const float*>(data)[row * stride]);
  }
};

template <class Storage>
struct Logits {
  const Storage* data;
  std::int64_t rows, classes, row_stride;  // class stride 1
  const Storage* row(std::int64_t i) const { return data + i * row_stride; }
  std::int64_t blocks() const { return (classes + kBlock - 1) / kBlock; }
};

struct Target {
  const std::int64_t* data;
  std::int64_t stride, ignore_index;
  std::int64_t at(std::int64_t row) const { return data[row * stride]; }
  bool ignored(std::int64_t row) const { return at(row) == ignore_index; }
};

// Fields of one row that outlive the forward: (kFields, N), field-major. The first five are the affine gradient.
enum Field { kMax, kScale, kSlope, kTargetTerm, kArgmaxTerm, kTargetProb, kEntropy, kFields };

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

// All that the gradient of a row needs besides its logits. An ignored row has target -1 and gradient 0.
template <class A>
struct RowGradient {
  AffineGradient<A> affine;
  std::int64_t target, argmax;
};

// What is compiled once an instruction set. A "block" below is item i of rows * blocks, row-major.
template <class Storage>
struct RowKernel {
  using A = Arithmetic<Storage>;
  // Whole rows [begin, end), statistics to gradient, while the row is in cache.
  void (*rows)(const ForwardBatch<Storage>&, std::int64_t begin, std::int64_t end);
  // The same in three steps for few long rows: their blocks, the rows, their blocks again.
  void (*block_stats)(const ForwardBatch<Storage>&, RowStats<A>*, std::int64_t begin, std::int64_t end);
  void (*finish_rows)(const ForwardBatch<Storage>&, const RowStats<A>*, RowGradient<A>*);
  void (*block_gradients)(
      const ForwardBatch<Storage>&, const RowStats<A>*, const RowGradient<A>*, std::int64_t begin, std::int64_t end);
  // Blocks of a gradient from saved fields (reduction "none", fp16).
  void (*recompute)(const BackwardBatch<Storage>&, std::int64_t begin, std::int64_t end);
};

struct RowKernels {
  RowKernel<float> f32;
  RowKernel<double> f64;
  RowKernel<BFloat16> bf16;
  RowKernel<Float16> f16;
};

// The instruction sets that are compiled in; row_kernels() takes the best that this machine has.
namespace baseline { extern const RowKernels kernels; }
namespace x86_v3 { extern const RowKernels kernels; }
namespace x86_v4 { extern const RowKernels kernels; }
const RowKernels& row_kernels();
const char* row_kernels_name();

}  // namespace dal
