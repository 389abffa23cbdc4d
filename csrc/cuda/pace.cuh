// The pace of DAL on a GPU: one block, because it looks at few rows.
#pragma once

#include "finish.cuh"

namespace dal {

template <class A> DAL_D void follow_rows(const Follow<A>& args) {
  Learnt learnt;
  const std::int64_t step = blockDim.x * args.rows.every;
  for (std::int64_t row = threadIdx.x * args.rows.every; row < args.rows.count; row += step) learnt.add(args.rows, row);
  __shared__ double scratch[3][32];
  learnt.confidence = across_block<Add>(learnt.confidence, scratch[0], 0.0);
  learnt.agreement = across_block<Add>(learnt.agreement, scratch[1], 0.0);
  learnt.rows = across_block<Add>(learnt.rows, scratch[2], 0.0);
  if (threadIdx.x > 0) return;
  Pace pace = *args.pace;
  if (args.sets_bound) {
    pace.bound = args.bound;
    pace.opening = args.opening;
  }
  follow(pace, learnt);
  keep_pace(pace, args.limits);
  *args.pace = pace;
}

}  // namespace dal
