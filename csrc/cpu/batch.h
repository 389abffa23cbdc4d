// What is compiled once an instruction set, and what its parts hand to each other.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../batch.h"

namespace dal {

// Statistics are taken block by block and merged in order, so that a row gives the same bits whether one
// thread reads all of it or several share it. 4096 floats and their exponentials fit a 48 KiB L1 together.
constexpr std::int64_t kBlock = 4096;
inline std::int64_t blocks_of(std::int64_t classes) { return (classes + kBlock - 1) / kBlock; }

// All that the gradient of a row needs besides its logits. An ignored row has target -1 and gradient 0.
template <class A>
struct RowGradient {
  AffineGradient<A> affine;
  std::int64_t target, argmax;
};

// Class indices (T, N): several targets of the same rows, which are ignored with the first of them.
struct Targets {
  const std::int64_t* data;
  std::int64_t count, target_stride, row_stride, ignore_index;
  std::int64_t at(std::int64_t row, std::int64_t target) const { return data[target * target_stride + row * row_stride]; }
  bool ignored(std::int64_t row) const { return at(row, 0) == ignore_index; }
};

// Quantities of rows, from which a loss is made elsewhere; those of an ignored row are of class 0.
template <class Storage>
struct QuantitiesBatch {
  using A = Arithmetic<Storage>;
  Logits<Storage> logits;
  Targets targets;
  A *log_prob, *entropy, *max_log_prob, *sum_log_prob, *square_sum;  // (T, N), and (N,) each
  RowSums<A>* sums;                                                  // (N,): for the gradient
  std::int64_t* argmax;                                              // (N,)
};

// Derivatives of that loss by a quantity: (N,), or (T, N) by ln p_y. Null where it does not depend on it.
template <class A>
struct Upstream {
  const A* data = nullptr;
  std::int64_t row_stride = 0, target_stride = 0;
  explicit operator bool() const { return data != nullptr; }
  A at(std::int64_t row, std::int64_t target = 0) const {
    return data ? data[target * target_stride + row * row_stride] : A(0);
  }
};

template <class Storage>
struct SlopesBatch {
  using A = Arithmetic<Storage>;
  Logits<Storage> logits;
  Targets targets;
  const RowSums<A>* sums;
  const std::int64_t* argmax;
  Upstream<A> by_log_prob, by_entropy, by_max_log_prob, by_sum_log_prob, by_square_sum;
  Storage* gradient;
};

// What is compiled once an instruction set. A "block" below is item i of rows * blocks, row-major.
template <class Storage>
struct RowKernel {
  using A = Arithmetic<Storage>;
  // Whole rows [begin, end), statistics to gradient, while the row is in cache.
  void (*rows)(const ForwardBatch<Storage>&, std::int64_t begin, std::int64_t end);
  // The same in three steps for few long rows: their blocks, the rows, their blocks again.
  void (*block_sums)(const ForwardBatch<Storage>&, RowSums<A>*, std::int64_t begin, std::int64_t end);
  void (*finish_rows)(const ForwardBatch<Storage>&, const RowSums<A>*, RowGradient<A>*);
  void (*block_gradients)(
      const ForwardBatch<Storage>&, const RowSums<A>*, const RowGradient<A>*, std::int64_t begin, std::int64_t end);
  // Blocks of a gradient from saved fields (reduction "none", fp16).
  void (*recompute)(const BackwardBatch<Storage>&, std::int64_t begin, std::int64_t end);
  // Rows [begin, end), and their gradients from saved fields, by the kernel whose lanes are rows; and up to how many
  // classes rows that could go by the other one go by it. Of double there is none.
  void (*lane_rows)(const ForwardBatch<Storage>&, const Layouts&, std::int64_t begin, std::int64_t end);
  void (*recompute_lanes)(const BackwardBatch<Storage>&, const Layouts&, std::int64_t begin, std::int64_t end);
  std::int64_t lane_classes;
  // Sums of rows [begin, end), and nothing else.
  void (*row_sums)(const SumsBatch<Storage>&, std::int64_t begin, std::int64_t end);
  // Quantities of rows [begin, end), and blocks of the gradient of what was made of them.
  void (*row_quantities)(const QuantitiesBatch<Storage>&, std::int64_t begin, std::int64_t end);
  void (*gradients_of_slopes)(const SlopesBatch<Storage>&, std::int64_t begin, std::int64_t end);
};

struct RowKernels {
  RowKernel<float> f32;
  RowKernel<double> f64;
  RowKernel<BFloat16> bf16;
  RowKernel<Float16> f16;
};
template <class S> const RowKernel<S>& kernel_of(const RowKernels& kernels) {
  if constexpr (std::is_same_v<S, float>) return kernels.f32;
  else if constexpr (std::is_same_v<S, double>) return kernels.f64;
  else if constexpr (std::is_same_v<S, BFloat16>) return kernels.bf16;
  else return kernels.f16;
}

// The instruction sets that are compiled in; row_kernels() takes the best that this machine has.
namespace baseline { extern const RowKernels kernels; }
namespace x86_v3 { extern const RowKernels kernels; }
namespace x86_v4 { extern const RowKernels kernels; }
namespace x86_v4_bf16 { extern const RowKernel<BFloat16> kernel; }
const RowKernels& row_kernels();
const char* row_kernels_name();
// Whether instructions for bfloat16 multiply faster here than those for float32, but for AMX.
bool bfloat16_products_are_fast();

}  // namespace dal
