// Rows that stay in registers from the sums to the gradient: logits are read once, the gradient written once.
#pragma once

#include <cooperative_groups.h>

#include "finish.cuh"

namespace dal {

template <class A> struct RowTotals {
  RowSums<A> sums;
  unsigned place;
};

// ---- who shares a row. Each knows its lane and how to reduce over all that share.

// A power of two of neighbouring lanes of a warp.
struct LanesOfWarp {
  int log_lanes, lanes, me;
  DAL_D explicit LanesOfWarp(int log_lanes)
      : log_lanes(log_lanes), lanes(opaque(1 << log_lanes)), me(opaque(static_cast<int>(threadIdx.x) & (lanes - 1))) {}
  DAL_D int lane() const { return me; }
  DAL_D int size() const { return lanes; }
  // Rounds in which all take one of `n`, rounded up.
  DAL_D int rounds(int n) const { return (n + lanes - 1) >> log_lanes; }
  template <class Op, class T> DAL_D T all(T x, int, T) const { return across<Op>(x, lanes); }
  DAL_D void sync() const { __syncwarp(); }
  // Every lane makes the coefficients for itself.
  DAL_D bool finishes() const { return true; }
  template <class A> DAL_D void tell(AffineGradient<A>&) const {}
  template <class S> DAL_D void share(Windows<S>&) const {}
  template <class A> DAL_D void join(RowTotals<A>&) const {}
  template <class A> DAL_D void rebase(AffineGradient<A>&, A, A) const {}
};

// A block of whole warps. `use` counts the reductions of a row, each with scratch of its own.
struct WholeBlock {
  DAL_D int lane() const { return threadIdx.x; }
  DAL_D int size() const { return blockDim.x; }
  DAL_D int rounds(int n) const { return static_cast<int>((n + blockDim.x - 1) / blockDim.x); }
  DAL_D void sync() const { __syncthreads(); }
  // The first warp makes the coefficients, and tells the others what they need of them.
  DAL_D bool finishes() const { return threadIdx.x < 32; }
  template <class A> DAL_D void tell(AffineGradient<A>& affine) const {
    __shared__ A told[2];
    if (threadIdx.x == 0) told[0] = affine.A, told[1] = affine.B;
    __syncthreads();
    affine.A = told[0], affine.B = told[1];
  }
  template <class Op, class T> DAL_D T all(T x, int use, T none) const {
    __shared__ T scratch[4][32];
    return across_block<Op>(x, scratch[use], none);
  }
  template <class S> DAL_D void share(Windows<S>&) const {}
  template <class A> DAL_D void join(RowTotals<A>&) const {}
  template <class A> DAL_D void rebase(AffineGradient<A>&, A, A) const {}
};

// Share number `part` of `parts` of the vectors of a row.
template <class S> DAL_D void take_share(Windows<S>& windows, int part, int parts) {
  const int each = (windows.in.vectors + parts - 1) / parts;
  windows.clip(part * each, (part + 1) * each);
}

template <class A> DAL_D RowTotals<A> merge_totals(const RowTotals<A>& l, const RowTotals<A>& r) {
  // A place counts only under the larger of two maxima; the place of a NaN under any.
  const auto place = [](const RowTotals<A>& own, const RowTotals<A>& other) {
    return own.sums.max < other.sums.max && own.place >= kMaximum ? kNowhere : own.place;
  };
  return {merge(l.sums, r.sums), min(place(l, r), place(r, l))};
}

// A cluster of blocks, each with a share of the row in its registers. They exchange totals through each other's shared
// memory, and merge them in the order of their ranks: the same bits in each.
struct Cluster : WholeBlock {
  template <class S> DAL_D void share(Windows<S>& windows) const {
    const auto cluster = cooperative_groups::this_cluster();
    take_share(windows, static_cast<int>(cluster.block_rank()), static_cast<int>(cluster.num_blocks()));
  }
  template <class A> DAL_D void join(RowTotals<A>& totals) const {
#if __CUDA_ARCH__ >= 900
    __shared__ A mine[3];
    __shared__ unsigned my_place;
    const auto cluster = cooperative_groups::this_cluster();
    if (threadIdx.x == 0) {
      mine[0] = totals.sums.max, mine[1] = totals.sums.sum, mine[2] = totals.sums.weighted;
      my_place = totals.place;
    }
    cluster.sync();
    const auto of = [&](unsigned rank) {
      const A* values = cluster.map_shared_rank(mine, rank);
      return RowTotals<A>{{values[0], values[1], values[2]}, *cluster.map_shared_rank(&my_place, rank)};
    };
    totals = of(0);
    for (unsigned rank = 1; rank < cluster.num_blocks(); ++rank) totals = merge_totals(totals, of(rank));
    cluster.sync();  // nobody leaves while its memory may be read
#endif
  }
  // From the maximum of the row to that of this block's share, which its exponents are relative to: with
  // s = own - m,  B <- e^s B,  A <- e^s (A + B s). A share of -inf alone, or far below, has nothing but powers of 0.
  template <class A> DAL_D void rebase(AffineGradient<A>& affine, A own, A max) const {
    const A shift = larger(own - max, kLowest<A>), ratio = power(shift * kToExponent<A>);
    affine.A = ratio * fma(affine.B, shift, affine.A);
    affine.B *= ratio;
  }
};

// How the rows of a call lie in memory.
enum class Rows {
  kWhole,  // all are made of whole aligned vectors
  kAny,    // ends of vectors stick out, and the gradient may lie otherwise than the logits
};

// One row by one group, N values a lane. KEEP: the powers stay in registers for the gradient; else only their exponents
// do.
// `loss` and `weight` are what the group adds to the reduction.
template <class S, int N, Rows ROWS, bool KEEP, class Group>
DAL_D void loss_row(
    const Forward<S>& args, const Group& group, std::int64_t row, bool writes, Arithmetic<S>& loss,
    Arithmetic<S>& weight) {
  using A = Arithmetic<S>;
  constexpr int V = kWidth<S>, NV = N / V;
  const ForwardBatch<S>& batch = args.batch;
  const int classes = static_cast<int>(batch.logits.classes), lanes = group.size();
  const RowInput<A> in = row_input(batch, row);
  const S* z = batch.logits.row(in.row);
  S* out = batch.gradient ? batch.gradient + in.row * classes : nullptr;
  Windows<S> windows(z, out, in.live ? classes : 0, ROWS == Rows::kWhole);
  group.share(windows);
  const int first = windows.out.begin + group.lane();
  // Who does not read takes the first vector, again and again.
  const bool reads = needs_reading(batch, in);
  if (!reads) windows.in.clip(0, 0);
  // Whole rows: plan.h leaves no lane more than twice what it needs, so the first half of its vectors are there without
  // a look. The others past the end repeat the last, and are left out of the sums: to fill them costs more.
  const int rounds = group.rounds(windows.in.vectors - first);
  const auto counts = [&](int v) { return ROWS == Rows::kAny || v < NV / 2 || v < rounds; };
  const std::int64_t step = static_cast<std::int64_t>(lanes) * V, stride = reads ? step : 0;
  A value[N];
  const S* at = reads ? z + first * V : z;
  const S* const last = z + (max(windows.in.vectors, 1) - 1) * V;
#pragma unroll
  for (int v = 0; v < NV; ++v, at += stride) {
    if constexpr (ROWS == Rows::kWhole)
      load_vector(counts(v) ? at : last, value + v * V);
    else
      windows.in.load(z, first + v * lanes, value + v * V, negative_infinity<A>());
  }
  A peak = value[0];
#pragma unroll
  for (int i = 1; i < N; ++i) peak = larger(peak, value[i]);
  peak = group.template all<Larger>(peak, 0, negative_infinity<A>());

  unsigned place = kNowhere;
  if (needs_place(batch)) {
    // From the last to the first, one by one: a minimum of them all would be spread over too many registers. A vector
    // that repeats the last one has higher classes than that.
#pragma unroll
    for (int i = N - 1; i >= 0; --i)
      place = first_place(place, value[i], peak, windows.in.at(first + i / V * lanes) + i % V);
    place = group.template all<Smaller>(place, 3, kNowhere);
  }

  // d = (z - m) log2 e,  e = 2^d,  S = sum e,  W = ln 2 sum e d. From here on `value` is d.
  const A origin = origin_of(peak);
  const bool entropic = __any_sync(0xffffffffu, needs_entropy(batch, in));
  A sum = 0, weighted = 0, e[KEEP ? N : 1];
  const auto sum_up = [&](bool with_sum, bool with_weighted) {
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      A sums = 0, weights = 0;
#pragma unroll
      for (int i = v * V; i < v * V + V; ++i) {
        A e_i;
        if (with_sum) {
          const A exact = exponent(value[i], origin);
          e_i = power(exact);
          value[i] = larger(exact, kLowest<A>);
          if (KEEP) e[i] = e_i;
          sums = i == v * V ? e_i : sums + e_i;
        } else {
          e_i = e[KEEP ? i : 0];
        }
        if (with_weighted) weights = i == v * V ? e_i * value[i] : fma(e_i, value[i], weights);
      }
      // One choice for both: a factor of 0 leaves no NaN that the row does not have anyway.
      const A factor = counts(v) ? A(1) : A(0);
      if (with_sum) sum = fma(sums, factor, sum);
      if (with_weighted) weighted = fma(weights, factor, weighted);
    }
  };
  // Without an entropy term a loop less; where nothing is kept, that would be two kinds of the first one.
  sum_up(true, !KEEP);
  if (KEEP && entropic) sum_up(false, true);
  if (!KEEP || entropic) weighted = group.template all<Add>(weighted, 1, A(0));
  RowTotals<A> totals{{peak, group.template all<Add>(sum, 2, A(0)), kLnBase<A> * weighted}, place};
  group.join(totals);

  AffineGradient<A> affine;
  if (group.finishes())
    affine = finish_row(args, row, in, totals.sums, totals.place, writes && in.live, loss);
  weight = in.weight;
  if (!out) return;
  group.tell(affine);
  if constexpr (ROWS == Rows::kAny) {  // made again: registers are short
    windows = Windows<S>(z, out, in.live ? opaque(classes) : 0);
    group.share(windows);
  }
  const int stores = group.rounds(windows.out.vectors - first);
  // gradient(i): of element i. Each kind has a loop of its own, without a choice in it.
  const auto store = [&](const auto& gradient) {
    S* to = out + first * V;
#pragma unroll
    for (int v = 0; v < NV; ++v, to += step) {
      A g[V];
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] = gradient(v * V + i);
      if constexpr (ROWS == Rows::kAny)
        windows.out.store(out, first + v * lanes, g);
      else if (v < NV / 2 || v < stores)
        store_vector(to, g);
    }
  };
  AffineGradient<A> own = affine;
  group.rebase(own, peak, totals.sums.max);
  const A slope = kLnBase<A> * own.B;
  const auto power_at = [&](int i) { return KEEP ? e[KEEP ? i : 0] : power(value[i]); };
  if (!in.ignored)
    store([&](int i) { return power_at(i) * fma(slope, value[i], own.A); });
  else if (in.live)
    store([&](int) { return A(0); });
  group.sync();
  if (group.lane() == 0 && !in.ignored)
    correct_terms(
        out, affine, in.target, in.target_logit, needs_argmax(batch.objective) ? class_at(totals.place) : -1,
        windows.out.begin_element(), windows.out.end_element());
}

// Several rows a warp.
template <class S, int N, Rows ROWS> DAL_D void loss_rows_of_lanes(const Forward<S>& args) {
  using A = Arithmetic<S>;
  __shared__ A losses[128], weights[128];
  const LanesOfWarp group(args.log_lanes);
  const int rows = blockDim.x >> args.log_lanes, mine = opaque(static_cast<int>(threadIdx.x) >> args.log_lanes);
  const bool writes = group.lane() == 0;
  A loss, weight;
  loss_row<S, N, ROWS, true>(args, group, std::int64_t(blockIdx.x) * rows + mine, writes, loss, weight);
  if (args.reduction == kNone) return;
  if (writes) {
    losses[mine] = loss;
    weights[mine] = weight;
  }
  __syncthreads();
  reduce_losses(args, sum_of_group(losses, rows), sum_of_group(weights, rows), blockIdx.x, gridDim.x, rows);
}

// A row a block.
template <class S, int N, Rows ROWS> DAL_D void loss_row_of_block(const Forward<S>& args) {
  Arithmetic<S> loss, weight;
  loss_row<S, N, ROWS, false>(args, WholeBlock{}, blockIdx.x, threadIdx.x == 0, loss, weight);
  reduce_losses(args, loss, weight, blockIdx.x, gridDim.x);
}

// A row a cluster.
template <class S, int N, Rows ROWS> DAL_D void loss_row_of_cluster(const Forward<S>& args) {
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  const unsigned row = blockIdx.x / cluster.num_blocks();
  const bool first = cluster.block_rank() == 0;
  Arithmetic<S> loss, weight;
  loss_row<S, N, ROWS, false>(args, Cluster{}, row, first && threadIdx.x == 0, loss, weight);
  // The last block may write over what all blocks of the cluster wrote, or read as knobs.
  if (args.batch.weight || args.follow.pace) cluster.sync();
  if (first) reduce_losses(args, loss, weight, row, gridDim.x / cluster.num_blocks());
#endif
}

}  // namespace dal
