// The parameters of the kernels, passed by value.
#pragma once

#include "../batch.h"
#include "../pace.h"

namespace dal {

// The pace after a training call of some rows, or, of none, under a new bound.
template <class A> struct Follow {
  Pace* pace;
  PaceRows<A> rows;
  PaceLimits limits;
  bool sets_bound;
  float bound, q_start, opening;
};

// A forward: the batch, and what its reduction needs. gradient_scale is 1 / N for a mean, whose true divisor is not
// known before the rows are read.
template <class S>
struct Forward {
  using A = Arithmetic<S>;
  ForwardBatch<S> batch;
  Layouts layouts;  // of the gradient always; of the logits where rows lie apart
  Reduction reduction;
  int log_lanes;     // 2^this lanes share a row, where several rows share a warp; of rows that lie apart, warps
  int splits;        // blocks that share a row, where rows are few
  A* partial;        // (2, blocks): sums of losses and weights
  A* parts;          // (3, N, splits): maximum, S, W of each split; wide (6, N, splits): all of RowSums
  unsigned* places;  // (N, splits): its argmax, as in place_of
  unsigned* ticket;  // counts the blocks that are done; 0 before and after
  A* correction;     // () N / divisor
  Follow<A> follow;  // with a pace that follows the reduced losses, or without one
  Learnt* learnt;    // (blocks): what each says of its rows for the pace, or null
};

// A gradient from what the forward kept of each row.
template <class S>
struct Backward {
  using A = Arithmetic<S>;
  BackwardBatch<S> batch;
  Layouts layouts;      // where rows lie apart
  const A* correction;  // N / divisor, or null
  bool if_changed;      // the gradient stands there already for a factor of 1
  int lanes;            // that share a row: a power of two, at most the block
};

// gradient * upstream * correction, in place.
template <class A> struct Rescale {
  A* gradient;
  const A *upstream, *correction;
  std::int64_t size;
};

}  // namespace dal
