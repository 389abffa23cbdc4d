// The backward: the gradient from what the forward kept of a row, or the written one times a factor.
#pragma once

#include "plan.h"
#include "rows.cuh"

namespace dal {

// With if_changed: whether the gradient that was written stands.
template <class S> DAL_D bool nothing_changed(const Backward<S>& args) {
  return args.if_changed && *args.batch.upstream * (args.correction ? *args.correction : Arithmetic<S>(1)) == 1;
}

// What the forward kept of a row, times what its gradient is multiplied by.
template <bool WIDE, class S> DAL_D AffineGradient<Arithmetic<S>> read_affine(const Backward<S>& args, std::int64_t row) {
  using A = Arithmetic<S>;
  const BackwardBatch<S>& batch = args.batch;
  const A factor = batch.upstream[row * batch.upstream_stride] * (args.correction ? *args.correction : A(1));
  const auto field = [&](Field f) { return batch.fields[f * batch.logits.rows + row]; };
  return {field(kMax), factor * field(kScale), factor * field(kSlope), factor * field(kTargetTerm),
          batch.prediction ? factor * field(kArgmaxTerm) : A(0), WIDE ? factor * field(kSquare) : A(0),
          WIDE ? factor * field(kConstant) : A(0)};
}

// blockIdx.x: rows, as many as there are groups of lanes in a block. blockIdx.y: parts of a row. The gradient may take
// the place of the logits: a thread writes what it alone has read, but for the target's logit.
template <class S, bool WIDE> DAL_D void gradient_rows(const Backward<S>& args) {
  using A = Arithmetic<S>;
  constexpr int V = kWidth<S>;
  const BackwardBatch<S>& batch = args.batch;
  if (nothing_changed(args)) return;
  const std::int64_t rows = batch.logits.rows;
  const int lane = threadIdx.x % args.lanes;
  const std::int64_t row = std::int64_t(blockIdx.x) * (blockDim.x / args.lanes) + threadIdx.x / args.lanes;
  const bool live = row < rows;
  const int classes = static_cast<int>(batch.logits.classes);
  const S* z = batch.logits.row(row);
  S* out = batch.gradient + row * classes;
  Windows<S> windows(z, out, live ? classes : 0);
  const int first = blockIdx.y * args.lanes * kBackwardShare;
  windows.clip(first, first + args.lanes * kBackwardShare);
  const std::int64_t target = live ? batch.target.at(row) : batch.target.ignore_index;
  const bool counted = target != batch.target.ignore_index;
  const int begin = windows.out.begin_element(), end = windows.out.end_element();
  AffineGradient<A> affine;
  A target_logit = 0;
  if (counted) {
    affine = read_affine<WIDE>(args, row);
    if (lane == 0 && target >= begin && target < end) target_logit = widen(z[target]);
  }
  if (batch.gradient == batch.logits.data) __syncthreads();  // before another lane writes there
#pragma unroll
  for (int v = 0; v < kBackwardShare; ++v) {
    const int k = first + v * args.lanes + lane;
    A g[V] = {};
    if (counted) {
      windows.in.template load<true>(z, k, g, A(0));
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] = affine_value<WIDE>(g[i], affine);
    }
    windows.out.store(out, k, g);
  }
  __syncthreads();
  if (lane == 0 && counted) {
    const int argmax = batch.prediction ? static_cast<int>(batch.prediction[row]) : -1;
    correct_terms<S, WIDE>(out, affine, target, target_logit, argmax, begin, end);
  }
}

// Where the factor is 1, nothing at all.
template <class A> DAL_D void scale_gradient(const Rescale<A>& args) {
  constexpr int V = kWidth<A>;
  const A factor = *args.upstream * *args.correction;
  if (factor == 1) return;
  const std::int64_t vectors = args.size / V, threads = std::int64_t(gridDim.x) * blockDim.x;
  const std::int64_t thread = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (std::int64_t k = thread; k < vectors; k += threads) {
    A v[V];
    A* const at = args.gradient + k * V;
    load_vector<true>(at, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] *= factor;
    store_vector(at, v);
  }
  for (std::int64_t i = vectors * V + thread; i < args.size; i += threads) args.gradient[i] *= factor;
}

}  // namespace dal
