// Rows that fit no registers (those of float64, and of losses that sum over all classes): read in a loop, and once more
// for the gradient, last part first, while that is still in cache. One power an element in each pass.
#pragma once

#include "rows.cuh"

namespace dal {

// Vectors that a thread has in flight at once.
template <class S> constexpr int kBatch = sizeof(S) == 8 ? 2 : 4;

// Totals of this thread's vectors, relative to the largest logit it has met: sums move only when that grows.
template <class S, bool WIDE> struct ThreadTotals {
  using A = Arithmetic<S>;
  static constexpr int V = kWidth<S>;
  A peak = negative_infinity<A>(), origin = 0, sum[V] = {}, weighted[V] = {}, squares[WIDE ? V : 1] = {};
  A differences = 0;
  int classes = 0;  // of `differences`
  unsigned place = kNowhere;

  DAL_D RowSums<A> sums() const {
    RowSums<A> total{peak, sum[0], weighted[0], differences, squares[0], static_cast<A>(classes)};
#pragma unroll
    for (int i = 1; i < V; ++i) {
      total.sum += sum[i], total.weighted += weighted[i];
      if (WIDE) total.squares += squares[WIDE ? i : 0];
    }
    return total;
  }
  DAL_D void grow(A top) {
    if (peak > negative_infinity<A>()) {  // else there is nothing to move
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const RowSums<A> moved = rebase(RowSums<A>{peak, sum[i], weighted[i], A(0), squares[WIDE ? i : 0], A(0)}, top);
        sum[i] = moved.sum;
        weighted[i] = moved.weighted;
        if (WIDE) squares[WIDE ? i : 0] = moved.squares;
      }
      // Not by rebase, which moves nothing where the sum is 0, as one of several is whose own classes lie far below.
      if (WIDE) differences += static_cast<A>(classes) * (peak - top);
    }
    if (place >= kMaximum) place = kNowhere;  // that of a NaN stays
    peak = origin = top;
  }
  // The elements `z` of vector k, of which none is larger than `peak`.
  template <bool ENTROPIC> DAL_D void add(const A* z, const Window<S>& window, int k) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A d = z[i] - origin, e = power(d * kToExponent<A>);
      sum[i] += e;
      if (ENTROPIC) weighted[i] = fma(e, larger(d, kLowest<A>), weighted[i]);
      if constexpr (WIDE) {
        squares[i] = fma(e, e, squares[i]);
        const bool counts = window.holds(k, i);
        differences += counts ? d : A(0);
        classes += counts;
      }
    }
  }
};

template <class S, bool ENTROPIC, bool WIDE>
DAL_D ThreadTotals<S, WIDE> read_share(const Window<S>& window, const S* z, bool places) {
  using A = Arithmetic<S>;
  constexpr int V = kWidth<S>;
  const A lowest = negative_infinity<A>();
  ThreadTotals<S, WIDE> totals;
  const int step = blockDim.x;
#pragma unroll 1
  for (int k = window.begin + threadIdx.x; k < window.vectors; k += kBatch<S> * step) {
    A z_of[kBatch<S> * V];
#pragma unroll
    for (int b = 0; b < kBatch<S>; ++b) window.load(z, k + b * step, z_of + b * V, lowest);
    A top = lowest;
#pragma unroll
    for (int i = 0; i < kBatch<S> * V; ++i) top = larger(top, z_of[i]);
    if (top > totals.peak) totals.grow(top);
    if (places) {
#pragma unroll
      for (int i = 0; i < kBatch<S> * V; ++i)
        totals.place =
            min(totals.place, place_of(z_of[i], totals.peak, window.at(k + i / V * step) + i % V));
    }
#pragma unroll
    for (int b = 0; b < kBatch<S>; ++b) totals.template add<ENTROPIC>(z_of + b * V, window, k + b * step);
  }
  return totals;
}

// Totals of the block's share, the same bits in each thread.
template <class S, bool WIDE>
DAL_D RowTotals<Arithmetic<S>> totals_of_block(const ThreadTotals<S, WIDE>& own, const Window<S>& window) {
  using A = Arithmetic<S>;
  const WholeBlock block;
  const A peak = block.all<Larger>(own.peak, 0, negative_infinity<A>());
  const RowSums<A> sums = rebase(own.sums(), peak);
  const bool counts = own.peak == peak || own.place < kMaximum;
  RowTotals<A> totals{{peak, block.all<Add>(sums.sum, 1, A(0)), block.all<Add>(sums.weighted, 2, A(0))},
                      block.all<Smaller>(counts ? own.place : kNowhere, 3, kNowhere)};
  if constexpr (WIDE) {
    totals.sums.differences = block.all<Add>(sums.differences, 0, A(0));
    totals.sums.squares = block.all<Add>(sums.squares, 3, A(0));
    totals.sums.classes = static_cast<A>(window.elements());
  }
  return totals;
}

// Whoever asks for the sums of a wide loss gets all of them.
template <class S, bool WIDE>
DAL_D RowTotals<Arithmetic<S>> read_row(const Window<S>& window, const S* z, bool entropic, bool places) {
  if constexpr (WIDE) return totals_of_block(read_share<S, true, true>(window, z, places), window);
  return totals_of_block(
      entropic ? read_share<S, true, false>(window, z, places) : read_share<S, false, false>(window, z, places),
      window);
}

// A row a block. The gradient of wide losses is made in the backward.
template <class S, bool WIDE> DAL_D void loss_long_rows(const Forward<S>& args) {
  using A = Arithmetic<S>;
  constexpr int V = kWidth<S>;
  const ForwardBatch<S>& batch = args.batch;
  const int classes = static_cast<int>(batch.logits.classes), step = blockDim.x;
  const std::int64_t row = blockIdx.x;
  const RowInput<A> in = row_input(batch, row);
  const S* z = batch.logits.row(row);
  S* out = !WIDE && batch.gradient ? batch.gradient + row * classes : nullptr;
  Windows<S> windows(z, out, in.live ? classes : 0);
  if (!needs_reading(batch, in)) windows.in.clip(0, 0);
  const RowTotals<A> totals = read_row<S, WIDE>(windows.in, z, needs_entropy(batch, in), needs_place(batch));
  A loss;
  const AffineGradient<A> affine =
      finish_row<S, WIDE>(args, row, in, totals.sums, totals.place, in.live && threadIdx.x == 0, loss);
  if (out) {
    const int rounds = (windows.out.vectors + step - 1) / step;
#pragma unroll(kBatch<S>)
    for (int round = rounds - 1; round >= 0; --round) {
      const int k = round * step + threadIdx.x;
      A g[V];
      windows.in.load(z, k, g, A(0));
#pragma unroll
      for (int i = 0; i < V; ++i)
        g[i] = in.ignored ? A(0) : affine_value<false>(g[i], affine);
      windows.out.store(out, k, g);
    }
    __syncthreads();
    if (threadIdx.x == 0 && !in.ignored)
      correct_terms(
          out, affine, in.target, in.target_logit, needs_argmax(batch.objective) ? class_at(totals.place) : -1, 0,
          classes);
  }
  reduce_losses(args, loss, in.weight, blockIdx.x, gridDim.x);
}

// Few rows: block (row, split) reads a share; the last block merges the shares of each row in order. The gradient is
// made in the backward, by as many blocks.
template <class S, bool WIDE> DAL_D void loss_split_rows(const Forward<S>& args) {
  using A = Arithmetic<S>;
  constexpr int kParts = WIDE ? 6 : 3;
  const ForwardBatch<S>& batch = args.batch;
  const std::int64_t rows = batch.logits.rows;
  {
    const std::int64_t row = blockIdx.x / args.splits;
    const RowInput<A> in = row_input(batch, row);
    const S* z = batch.logits.row(row);
    Windows<S> windows(z, static_cast<const S*>(nullptr), static_cast<int>(batch.logits.classes));
    take_share(windows, static_cast<int>(blockIdx.x % args.splits), args.splits);
    if (!needs_reading(batch, in)) windows.in.clip(0, 0);
    const RowTotals<A> totals = read_row<S, WIDE>(windows.in, z, needs_entropy(batch, in), needs_place(batch));
    if (threadIdx.x == 0) {
      const RowSums<A>& sums = totals.sums;
      const A parts[6] = {sums.max, sums.sum, sums.weighted, sums.differences, sums.squares, sums.classes};
      for (int i = 0; i < kParts; ++i) args.parts[i * std::int64_t(gridDim.x) + blockIdx.x] = parts[i];
      args.places[blockIdx.x] = totals.place;
    }
  }
  if (!is_last_block(args.ticket, gridDim.x)) return;
  A loss = 0, weight = 0;
  for (std::int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    const auto part = [&](int split) {
      const std::int64_t at = row * args.splits + split, size = gridDim.x;
      const auto value = [&](int i) { return i < kParts ? __ldcg(args.parts + i * size + at) : A(0); };
      return RowTotals<A>{
          {value(0), value(1), value(2), value(3), value(4), value(5)}, __ldcg(args.places + at)};
    };
    RowTotals<A> totals = part(0);
    for (int split = 1; split < args.splits; ++split) totals = merge_totals(totals, part(split));
    const RowInput<A> in = row_input(batch, row);
    A own;
    finish_row<S, WIDE>(args, row, in, totals.sums, totals.place, true, own);
    loss += own;
    weight += in.weight;
  }
  if (args.reduction == kNone) return;
  __shared__ A scratch[2][32];
  loss = across_block<Add>(loss, scratch[0], A(0));
  weight = across_block<Add>(weight, scratch[1], A(0));
  write_loss(args, loss, weight);
}

// Sums of a row alone, a row a block, for whoever makes a loss of them.
template <class S> DAL_D void row_statistics(const SumsBatch<S>& args) {
  using A = Arithmetic<S>;
  const std::int64_t row = blockIdx.x, rows = args.logits.rows;
  const S* z = args.logits.row(row);
  const Windows<S> windows(z, static_cast<const S*>(nullptr), static_cast<int>(args.logits.classes));
  const RowTotals<A> totals = args.wide ? read_row<S, true>(windows.in, z, true, args.argmax)
                                        : read_row<S, false>(windows.in, z, true, args.argmax);
  if (threadIdx.x) return;
  const RowSums<A>& sums = totals.sums;
  const A values[5] = {sums.max, sums.sum, sums.weighted, sums.differences, sums.squares};
#pragma unroll
  for (int f = 0; f < 5; ++f)
    if (f < 3 || args.wide) args.sums[f * rows + row] = values[f];
  if (args.argmax) args.argmax[row] = class_at(totals.place);
}

}  // namespace dal
