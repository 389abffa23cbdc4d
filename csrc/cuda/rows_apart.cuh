// Rows whose classes lie apart, as those of logits (N, C, S): neighbouring lanes take neighbouring rows, each all classes
// of its own, or as many warps as it takes share them. Logits are read once, the gradient is written once.
#pragma once

#include "finish.cuh"
#include "gradient.cuh"

namespace dal {

// Where a row is, by a division of 32 bits where that will do.
DAL_D std::int64_t row_at(const Layout& layout, std::int64_t row) {
  if (row >> 31) return layout.at(row);
  const unsigned inner = static_cast<unsigned>(min(layout.inner, std::int64_t(0xffffffff)));
  const unsigned image = static_cast<unsigned>(row) / inner, position = static_cast<unsigned>(row) - image * inner;
  return image * layout.outer_stride + position * layout.inner_stride;
}

// The warps of a block that share rows: this thread's is the same in each of them.
struct SharedRow {
  int log_shares, shares, share, mine;  // mine: which of the block's rows
  DAL_D explicit SharedRow(int log_shares) : log_shares(log_shares), shares(1 << log_shares) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    share = warp & (shares - 1);
    mine = (warp >> log_shares) * 32 + lane;
  }
  // Of a row this lane has the classes share, share + shares, ...
  DAL_D int class_at_place(int i) const { return share + (i << log_shares); }
  DAL_D int place_of_class(int j) const { return (j & (shares - 1)) == share ? j >> log_shares : -1; }
  // Of all shares, in their order: the same bits in each. `scratch`, of a value a thread, is not used again.
  template <class Op, class T> DAL_D T all(T x, T* scratch) const {
    if (shares == 1) return x;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    scratch[threadIdx.x] = x;
    __syncthreads();
    const T* const of_row = scratch + ((threadIdx.x / 32) >> log_shares << log_shares) * 32 + lane;
    T result = of_row[0];
    for (int other = 1; other < shares; ++other) result = Op{}(result, of_row[32 * other]);
    return result;
  }
};

// LEAST to N classes a lane.
template <class S, int LEAST, int N, bool WIDE> DAL_D void loss_rows_apart(const Forward<S>& args) {
  using A = Arithmetic<S>;
  __shared__ A scratch[WIDE ? 6 : 4][32 * kMostShares];
  __shared__ unsigned places[32 * kMostShares];
  const ForwardBatch<S>& batch = args.batch;
  const Layouts& layouts = args.layouts;
  const SharedRow group(args.log_lanes);
  const int classes = static_cast<int>(batch.logits.classes), rows = static_cast<int>(blockDim.x) >> group.log_shares;
  const int count = (classes - group.share + group.shares - 1) >> group.log_shares;
  const auto holds = [&](int i) { return i < LEAST || i < count; };
  RowInput<A> in = row_input<S, false>(batch, std::int64_t(blockIdx.x) * rows + group.mine);
  const bool valid = static_cast<std::uint64_t>(in.target) < static_cast<std::uint64_t>(classes);
  const int target = valid ? group.place_of_class(static_cast<int>(in.target)) : -1;

  A value[N];
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = negative_infinity<A>();
  if (needs_reading(batch, in)) {
    const S* z = batch.logits.data + row_at(layouts.logits, in.row) + group.share * layouts.logits.class_stride;
    const std::int64_t step = layouts.logits.class_stride << group.log_shares;
#pragma unroll
    for (int i = 0; i < N; ++i, z += step)
      if (holds(i)) value[i] = widen(*z);
  }
  A peak = value[0], logit = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    peak = larger(peak, value[i]);
    if (i == target) logit = value[i];
  }
  peak = group.template all<Larger>(peak, scratch[0]);
  logit = group.template all<Add>(logit, scratch[1]);
  if (valid) in.target_logit = logit;
  unsigned place = kNowhere;
  if (needs_place(batch)) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (holds(i)) place = min(place, place_of(value[i], peak, group.class_at_place(i)));
    place = group.template all<Smaller>(place, places);
  }

  // From here on `value` is z - m, and no less than kLowest.
  const A origin = origin_of(peak);
  RowSums<A> sums{peak, 0, 0, 0, 0, static_cast<A>(classes)};
  A e[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A exact = value[i] - origin;
    e[i] = power(exact * kToExponent<A>);
    value[i] = kept_larger(exact, kLowest<A>);
    sums.sum += e[i];
    sums.weighted = fma(e[i], value[i], sums.weighted);
    if (WIDE) {
      if (holds(i)) sums.differences += exact;
      sums.squares = fma(e[i], e[i], sums.squares);
    }
  }
  sums.sum = group.template all<Add>(sums.sum, scratch[2]);
  sums.weighted = group.template all<Add>(sums.weighted, scratch[3]);
  if constexpr (WIDE) {
    sums.differences = group.template all<Add>(sums.differences, scratch[4]);
    sums.squares = group.template all<Add>(sums.squares, scratch[5]);
  }
  const bool first = group.share == 0;
  A loss;
  // Each share makes the coefficients for itself.
  const AffineGradient<A> affine = finish_row<S, WIDE>(args, in.row, in, sums, place, first && in.live, loss);
  if (batch.gradient && in.live) {
    S* to = batch.gradient + row_at(layouts.gradient, in.row) + group.share * layouts.gradient.class_stride;
    const std::int64_t step = layouts.gradient.class_stride << group.log_shares;
    const auto store = [&](const auto& gradient) {
#pragma unroll
      for (int i = 0; i < N; ++i, to += step)
        if (holds(i)) narrow(gradient(i), *to);
    };
    // The special classes are part of the rule: stores of single classes would be scattered.
    const auto rule = [&](int i) {
      const A slope = fma(affine.B, value[i], affine.A);
      const A g = WIDE ? fma(e[i], fma(affine.E, e[i], slope), affine.D) : e[i] * slope;
      return g - (i == target ? affine.t : A(0));
    };
    // Where nobody asks for the largest class an ignored row was not read: its powers and coefficients are 0. (Of more
    // classes two loops would take more registers than there are.)
    if (N <= kApartValues && !needs_place(batch)) {
      store(rule);
    } else {
      const int argmax = needs_argmax(batch.objective) ? group.place_of_class(class_at(place)) : -1;
      store([&](int i) { return in.ignored ? A(0) : rule(i) - (i == argmax ? affine.u : A(0)); });
    }
  }
  if (args.reduction == kNone) return;
  __shared__ A losses[128], weights[128];
  if (first) {
    losses[group.mine] = loss;
    weights[group.mine] = in.weight;
  }
  __syncthreads();
  reduce_losses(args, sum_of_group(losses, rows), sum_of_group(weights, rows), blockIdx.x, gridDim.x, rows);
}

// blockIdx.x: a row a thread. blockIdx.y: shares of its classes.
template <class S, bool WIDE> DAL_D void gradient_rows_apart(const Backward<S>& args) {
  using A = Arithmetic<S>;
  const BackwardBatch<S>& batch = args.batch;
  const Layouts& layouts = args.layouts;
  if (nothing_changed(args)) return;
  const std::int64_t row = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= batch.logits.rows) return;
  const int begin = static_cast<int>(blockIdx.y) * kApartShare;
  const int end = min(begin + kApartShare, static_cast<int>(batch.logits.classes));
  const std::int64_t target = batch.target.at(row);
  const bool counted = target != batch.target.ignore_index;
  AffineGradient<A> affine;
  if (counted) affine = read_affine<WIDE>(args, row);
  const std::int64_t argmax = batch.prediction ? batch.prediction[row] : -1;
  const S* z = batch.logits.data + row_at(layouts.logits, row) + begin * layouts.logits.class_stride;
  S* to = batch.gradient + row_at(layouts.gradient, row) + begin * layouts.gradient.class_stride;
#pragma unroll 8
  for (int j = begin; j < end; ++j, z += layouts.logits.class_stride, to += layouts.gradient.class_stride) {
    A g = 0;
    if (counted) g = affine_value<WIDE>(widen(*z), affine);
    if (j == target) g -= affine.t;
    if (j == argmax) g -= affine.u;
    narrow(g, *to);
  }
}

}  // namespace dal
