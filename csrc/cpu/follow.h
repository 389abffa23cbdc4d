// The pace of DAL after a training call on a CPU.
#pragma once

#include "../pace.h"

namespace dal {

template <class A>
void follow_rows(Pace& pace, const PaceRows<A>& rows, const PaceLimits& limits) {
  // Four sums, because each addition to one of them waits for the last.
  Learnt part[4];
  int turn = 0;
  for (std::int64_t row = 0; row < rows.count; row += rows.every) part[turn++ % 4].add(rows, row);
  for (int i = 1; i < 4; ++i) part[0].add(part[i]);
  follow(pace, part[0]);
  keep_pace(pace, limits);
}

}  // namespace dal
