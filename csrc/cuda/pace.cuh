// The pace of DAL on a GPU: in the block that adds up the losses of a call, or in a launch of its own, by one block.
#pragma once

#include "arguments.h"
#include "reduce.cuh"

namespace dal {

// This thread's part of the rows from `first` to before `last`, of which those are looked at whose number is a multiple
// of `every`.
template <class A> DAL_D Learnt learnt_by_thread(const PaceRows<A>& rows, std::int64_t first, std::int64_t last) {
  Learnt learnt;
  const std::int64_t step = blockDim.x * rows.every, end = min(last, rows.count);
  std::int64_t row = (first + rows.every - 1) / rows.every * rows.every + threadIdx.x * rows.every;
  // So many rows wait for memory together, in no more registers than the smallest kernels have.
#pragma unroll 3
  for (; row < end; row += step) learnt.add(rows, row);
  return learnt;
}

DAL_D Learnt across_block(const Learnt& own) {
  __shared__ double scratch[3][32];
  return {across_block<Add>(own.confidence, scratch[0], 0.0), across_block<Add>(own.agreement, scratch[1], 0.0),
          across_block<Add>(own.rows, scratch[2], 0.0)};
}

// By all threads of a block, each with its part.
template <class A> DAL_D void follow_learnt(const Follow<A>& args, const Learnt& own) {
  const Learnt learnt = across_block(own);
  if (threadIdx.x > 0) return;
  Pace pace = *args.pace;
  if (args.sets_bound) {
    pace.bound = args.bound;
    pace.q_start = args.q_start;
    pace.opening = args.opening;
  }
  follow(pace, learnt);
  keep_pace(pace, args.limits);
  *args.pace = pace;
}

template <class A> DAL_D void follow_rows(const Follow<A>& args) {
  follow_learnt(args, learnt_by_thread(args.rows, 0, args.rows.count));
}

// What the `rows` of this block say, for the last block. Called, as what follows is, because in place calls without a
// pace would compute its addresses too.
template <class S> __device__ __noinline__ void leave_learnt(const Forward<S>& args, unsigned block, int rows) {
  const std::int64_t first = std::int64_t(block) * rows;
  const Learnt learnt = across_block(learnt_by_thread(args.follow.rows, first, first + rows));
  if (threadIdx.x == 0) args.learnt[block] = learnt;
}

// By the last block. It may write over the knobs of the call, which may be the first two numbers of the pace: a block
// has read its own before it counts as done, and this one before the barrier. Where blocks have a row each, it looks at
// the rows itself: to leave a sum would cost each block, and save this one nothing.
template <class S> __device__ __noinline__ void follow_call(const Forward<S>& args) {
  __syncthreads();
  if (!args.learnt) return follow_rows(args.follow);
  Learnt own;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    const Learnt* from = args.learnt + i;
    own.add({__ldcg(&from->confidence), __ldcg(&from->agreement), __ldcg(&from->rows)});
  }
  follow_learnt(args.follow, own);
}

}  // namespace dal
