// Rows that fit no registers (and those of float64): read in a loop, and once more for the gradient, last part first,
// while that is still in cache. One power an element in each pass.
#pragma once

#include "rows.cuh"

namespace dal {

// Vectors that a thread has in flight at once.
template <class S> constexpr int kBatch = sizeof(S) == 8 ? 2 : 4;

// Totals of this thread's vectors, relative to the largest logit it has met: sums move only when that grows.
template <class S> struct ThreadTotals {
  using A = Arithmetic<S>;
  static constexpr int V = kWidth<S>;
  A peak = negative_infinity<A>(), origin = 0, sum[V] = {}, weighted[V] = {};
  unsigned place = kNowhere;

  DAL_D RowStats<A> stats() const {
    RowStats<A> total{peak, sum[0], weighted[0]};
#pragma unroll
    for (int i = 1; i < V; ++i) total.sum += sum[i], total.weighted += weighted[i];
    return total;
  }
  DAL_D void grow(A top) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const RowStats<A> moved = rebase(RowStats<A>{peak, sum[i], weighted[i]}, top);
      sum[i] = moved.sum;
      weighted[i] = moved.weighted;
    }
    if (place >= kMaximum) place = kNowhere;  // that of a NaN stays
    peak = origin = top;
  }
  // Elements of classes j, j + 1, ... of which none is larger than `peak`.
  template <bool ENTROPIC> DAL_D void add(const A* z) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A d = z[i] - origin, e = power(d * kToExponent<A>);
      sum[i] += e;
      if (ENTROPIC) weighted[i] = fma(e, larger(d, kLowest<A>), weighted[i]);
    }
  }
};

template <class S, bool ENTROPIC>
DAL_D ThreadTotals<S> read_share(const Window<S>& window, const S* z, bool places) {
  using A = Arithmetic<S>;
  constexpr int V = kWidth<S>;
  const A lowest = negative_infinity<A>();
  ThreadTotals<S> totals;
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
    for (int b = 0; b < kBatch<S>; ++b) totals.template add<ENTROPIC>(z_of + b * V);
  }
  return totals;
}

// Totals of the block's share, the same bits in each thread.
template <class S> DAL_D RowTotals<Arithmetic<S>> totals_of_block(const ThreadTotals<S>& own) {
  using A = Arithmetic<S>;
  const WholeBlock block;
  const A peak = block.all<Larger>(own.peak, 0, negative_infinity<A>());
  const RowStats<A> stats = rebase(own.stats(), peak);
  const bool counts = own.peak == peak || own.place < kMaximum;
  return {{peak, block.all<Add>(stats.sum, 1, A(0)), block.all<Add>(stats.weighted, 2, A(0))},
          block.all<Smaller>(counts ? own.place : kNowhere, 3, kNowhere)};
}

template <class S> DAL_D RowTotals<Arithmetic<S>> read_row(
    const Forward<S>& args, const RowInput<Arithmetic<S>>& in, const Window<S>& window, const S* z) {
  const bool places = args.batch.hard || args.batch.prediction;
  return totals_of_block(needs_entropy(args.batch, in) ? read_share<S, true>(window, z, places)
                                                      : read_share<S, false>(window, z, places));
}

// A row a block.
template <class S> DAL_D void loss_long_rows(const Forward<S>& args) {
  using A = Arithmetic<S>;
  constexpr int V = kWidth<S>;
  const ForwardBatch<S>& batch = args.batch;
  const int classes = static_cast<int>(batch.logits.classes), step = blockDim.x;
  const std::int64_t row = blockIdx.x;
  const RowInput<A> in = row_input(batch, row);
  const S* z = batch.logits.row(row);
  S* out = batch.gradient ? batch.gradient + row * classes : nullptr;
  Windows<S> windows(z, out, in.live ? classes : 0);
  if (!needs_reading(batch, in)) windows.in.clip(0, 0);
  const RowTotals<A> totals = read_row(args, in, windows.in, z);
  A loss;
  const AffineGradient<A> affine =
      finish_row(args, row, in, totals.stats, totals.place, in.live && threadIdx.x == 0, loss);
  if (out) {
    const int rounds = (windows.out.vectors + step - 1) / step;
#pragma unroll(kBatch<S>)
    for (int round = rounds - 1; round >= 0; --round) {
      const int k = round * step + threadIdx.x;
      A g[V];
      windows.in.load(z, k, g, A(0));
#pragma unroll
      for (int i = 0; i < V; ++i)
        g[i] = in.ignored ? A(0) : affine_value(g[i], affine);
      windows.out.store(out, k, g);
    }
    __syncthreads();
    if (threadIdx.x == 0 && !in.ignored)
      correct_terms(out, affine, in.target, in.target_logit, batch.hard ? class_at(totals.place) : -1, 0, classes);
  }
  reduce_losses(args, loss, in.weight, blockIdx.x, gridDim.x);
}

// Few rows: block (row, split) reads a share; the last block merges the shares of each row in order. The gradient is
// made in the backward, by as many blocks.
template <class S> DAL_D void loss_split_rows(const Forward<S>& args) {
  using A = Arithmetic<S>;
  const ForwardBatch<S>& batch = args.batch;
  const std::int64_t rows = batch.logits.rows;
  {
    const std::int64_t row = blockIdx.x / args.splits;
    const RowInput<A> in = row_input(batch, row);
    const S* z = batch.logits.row(row);
    Windows<S> windows(z, static_cast<const S*>(nullptr), static_cast<int>(batch.logits.classes));
    take_share(windows, static_cast<int>(blockIdx.x % args.splits), args.splits);
    if (!needs_reading(batch, in)) windows.in.clip(0, 0);
    const RowTotals<A> totals = read_row(args, in, windows.in, z);
    if (threadIdx.x == 0) {
      const A parts[3] = {totals.stats.max, totals.stats.sum, totals.stats.weighted};
      for (int i = 0; i < 3; ++i) args.parts[i * std::int64_t(gridDim.x) + blockIdx.x] = parts[i];
      args.places[blockIdx.x] = totals.place;
    }
  }
  if (!is_last_block(args.ticket, gridDim.x)) return;
  A loss = 0, weight = 0;
  for (std::int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    const auto part = [&](int split) {
      const std::int64_t at = row * args.splits + split, size = gridDim.x;
      const auto value = [&](int i) { return __ldcg(args.parts + i * size + at); };
      return RowTotals<A>{{value(0), value(1), value(2)}, __ldcg(args.places + at)};
    };
    RowTotals<A> totals = part(0);
    for (int split = 1; split < args.splits; ++split) totals = merge_totals(totals, part(split));
    const RowInput<A> in = row_input(batch, row);
    A own;
    finish_row(args, row, in, totals.stats, totals.place, true, own);
    loss += own;
    weight += in.weight;
  }
  if (args.reduction == kNone) return;
  __shared__ A scratch[2][32];
  loss = across_block<Add>(loss, scratch[0], A(0));
  weight = across_block<Add>(weight, scratch[1], A(0));
  write_loss(args, loss, weight);
}

}  // namespace dal
