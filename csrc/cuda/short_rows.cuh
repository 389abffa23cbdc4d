// Rows of few classes: a thread each, so that no lane idles on a ragged row and nothing is shuffled. Logits come in and
// gradients go out through shared memory, by whole vectors of neighbouring rows, whatever their alignment.
#pragma once

#include "finish.cuh"

namespace dal {

// Between shared and global memory, by all threads of the block; only `global`, one of the two, may lie anywhere.
template <class S> DAL_D void copy(S* to, const S* from, int size, const S* global) {
  constexpr int V = kWidth<S>;
  const int vectors = elements_past_boundary(global) ? 0 : size / V;
  uint4* target = reinterpret_cast<uint4*>(to) + threadIdx.x;
  const uint4* source = reinterpret_cast<const uint4*>(from) + threadIdx.x;
  const uint4* const end = reinterpret_cast<const uint4*>(from) + vectors;
  for (; source < end; target += blockDim.x, source += blockDim.x) *target = *source;
  for (int j = vectors * V + threadIdx.x; j < size; j += blockDim.x) to[j] = from[j];
}

// LEAST to MOST classes, in registers.
template <class S, int LEAST, int MOST> DAL_D void loss_short_rows(const Forward<S>& args) {
  using A = Arithmetic<S>;
  extern __shared__ uint4 shared[];
  __shared__ A losses[128], weights[128];
  const ForwardBatch<S>& batch = args.batch;
  const int classes = opaque(static_cast<int>(batch.logits.classes)), threads = blockDim.x;
  const std::int64_t first = std::int64_t(blockIdx.x) * threads, row = first + threadIdx.x;
  const int rows = static_cast<int>(min(batch.logits.rows - first, std::int64_t(threads)));
  S* const tile = reinterpret_cast<S*>(shared);
  const S* from = batch.logits.row(first);
  if (batch.logits.row_stride == classes) {
    copy(tile, from, rows * classes, from);
  } else {
    for (int k = threadIdx.x; k < rows * classes; k += threads)
      tile[k] = from[k / classes * batch.logits.row_stride + k % classes];
  }
  const RowInput<A> in = row_input(batch, row);
  __syncthreads();

  S* const z = tile + (in.live ? threadIdx.x : 0) * classes;
  A value[MOST];
#pragma unroll
  for (int j = 0; j < MOST; ++j) value[j] = j < LEAST || j < classes ? widen(z[j]) : negative_infinity<A>();
  A peak = value[0];
#pragma unroll
  for (int j = 1; j < MOST; ++j) peak = larger(peak, value[j]);
  const A origin = origin_of(peak);
  A sum = 0, weighted = 0, e[MOST], d[MOST];
#pragma unroll
  for (int j = 0; j < MOST; ++j) {
    const A exact = value[j] - origin;
    e[j] = power(exact * kToExponent<A>);
    d[j] = kept_larger(exact, kLowest<A>);
    sum += e[j];
    weighted = fma(e[j], d[j], weighted);
  }
  unsigned place = kNowhere;
  if (needs_place(batch)) {
#pragma unroll
    for (int j = 0; j < MOST; ++j)
      if (j < LEAST || j < classes) place = min(place, place_of(value[j], peak, j));
  }
  A loss;
  const AffineGradient<A> affine = finish_row(args, row, in, {peak, sum, weighted}, place, in.live, loss);
  if (batch.gradient) {
    __syncthreads();  // threads without a row have read the first one
    if (in.live && in.ignored) {
      for (int j = 0; j < classes; ++j) narrow(A(0), z[j]);
    } else if (in.live) {
#pragma unroll
      for (int j = 0; j < MOST; ++j)
        if (j < LEAST || j < classes) narrow(e[j] * fma(affine.B, d[j], affine.A), z[j]);
      correct_terms(
          z, affine, in.target, in.target_logit, needs_argmax(batch.objective) ? class_at(place) : -1, 0, classes);
    }
    __syncthreads();
    S* const to = batch.gradient + first * classes;
    copy(to, tile, rows * classes, to);
  }
  if (args.reduction == kNone) return;
  losses[threadIdx.x] = loss;
  weights[threadIdx.x] = in.weight;
  __syncthreads();
  reduce_losses(args, sum_of_group(losses, threads), sum_of_group(weights, threads), blockIdx.x, gridDim.x, threads);
}

}  // namespace dal
