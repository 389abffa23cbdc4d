// A batch of rows on threads: label checks and divisor first, then the row kernel, then the reduction.
// Without torch: `Threads` is whatever runs a range in parallel.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "batch.h"

namespace dal {

// Fresh memory costs a page fault every 4 KiB, more than the kernel itself; every 2 MiB is bearable.
inline void advise_huge_pages(void* data, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t huge = std::uintptr_t(2) << 20;
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (address + huge - 1) & ~(huge - 1);
  const std::uintptr_t last = (address + static_cast<std::uintptr_t>(bytes)) & ~(huge - 1);
  if (bytes >= std::int64_t(4) << 20 && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

[[noreturn]] inline void refuse_class(
    std::int64_t target, std::int64_t row, std::int64_t classes, std::int64_t ignore_index) {
  throw std::invalid_argument("target at row " + std::to_string(row) + " is " + std::to_string(target) +
                              ", accepted are 0 to " + std::to_string(classes - 1) + " and ignore_index " +
                              std::to_string(ignore_index));
}
// Apart from what it throws, because a call a row would take as long as the rest of the check.
inline void require_class(
    std::int64_t target, std::int64_t row, std::int64_t classes, std::int64_t ignore_index) {
  if (target < 0 || target >= classes) refuse_class(target, row, classes, ignore_index);
}
// Of a row that its first target has not ignored.
inline void require_further_class(std::int64_t target, std::int64_t which, std::int64_t row, std::int64_t classes) {
  if (target < 0 || target >= classes)
    throw std::invalid_argument("target " + std::to_string(which) + " at row " + std::to_string(row) + " is " +
                                std::to_string(target) + ", accepted are 0 to " + std::to_string(classes - 1) +
                                ", because only target 0 may be ignore_index");
}

// Whether all labels are classes or ignored; counts those that are not ignored. Without branches, because there is one
// thread to look at the labels of all.
template <class S>
bool all_in_range(const ForwardBatch<S>& batch, std::int64_t& counted) {
  std::int64_t outside = 0;
  counted = 0;
  for (std::int64_t row = 0; row < batch.logits.rows; ++row) {
    const std::int64_t y = batch.target.at(row);
    const bool counts = y != batch.target.ignore_index;
    counted += counts;
    outside |= counts & (static_cast<std::uint64_t>(y) >= static_cast<std::uint64_t>(batch.logits.classes));
  }
  return outside == 0;
}

// Raises before anything is written. Returns sum_i weight[y_i] over the rows that are not ignored.
template <class S>
double check_and_count(const ForwardBatch<S>& batch) {
  using A = Arithmetic<S>;
  const std::int64_t rows = batch.logits.rows;
  for (std::int64_t row = 0; row < (batch.knobs.stride ? rows : std::min<std::int64_t>(rows, 1)); ++row)
    for (int k = 0; k < batch.knobs.count; ++k) {
      const A knob = batch.knobs.template at<A>(row, k);
      if (!(knob >= 0 && std::isfinite(knob)))
        throw std::invalid_argument("knobs must be finite and >= 0, got " + std::to_string(knob) + " at row " +
                                    std::to_string(row));
    }
  std::int64_t counted = 0;
  const bool in_range = all_in_range(batch, counted);
  if (in_range && !batch.weight) return static_cast<double>(counted);
  double divisor = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    if (batch.target.ignored(row)) continue;
    const std::int64_t y = batch.target.at(row);
    if (!in_range) require_class(y, row, batch.logits.classes, batch.target.ignore_index);
    if (batch.weight) divisor += static_cast<double>(batch.weight[y * batch.weight_stride]);
  }
  return divisor;
}

// Four sums, because each addition to one of them waits for the last.
template <class A>
double sum_in_order(const A* values, std::int64_t count) {
  double part[4] = {};
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) part[k] += static_cast<double>(values[i + k]);
  for (; i < count; ++i) part[0] += static_cast<double>(values[i]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// Elements a thread must have to do before another one is worth waking.
constexpr std::int64_t kGrain = 16384;

// Rows [begin, end) by a kernel whose lanes are rows: as many at once as it fills vectors with.
template <class Threads, class F>
void run_lanes(std::int64_t rows, std::int64_t classes, const Threads& threads, const F& f) {
  constexpr std::int64_t together = 16;
  threads.run((rows + together - 1) / together, std::max<std::int64_t>(1, kGrain / (together * classes)),
              [&](std::int64_t begin, std::int64_t end) { f(begin * together, std::min(end * together, rows)); });
}

// Returns the reduced loss (unused for kNone). With `lanes` by the kernel whose lanes are rows.
template <class S, class Threads>
double forward(
    ForwardBatch<S>& batch, Reduction reduction, const RowKernel<S>& kernel, const Layouts* lanes,
    const Threads& threads) {
  using A = Arithmetic<S>;
  const std::int64_t rows = batch.logits.rows, classes = batch.logits.classes, blocks = blocks_of(classes);
  const double divisor = check_and_count(batch);
  batch.gradient_scale = reduction == kMean ? static_cast<A>(1 / divisor) : A(1);
  if (batch.gradient) advise_huge_pages(batch.gradient, rows * classes * static_cast<std::int64_t>(sizeof(S)));

  if (lanes) {
    run_lanes(rows, classes, threads, [&](std::int64_t begin, std::int64_t end) {
      kernel.lane_rows(batch, *lanes, begin, end);
    });
  } else if (blocks > 1 && rows < 8 * threads.count()) {
    std::vector<RowSums<A>> sums(rows * blocks);
    std::vector<RowGradient<A>> gradients(rows);
    const std::int64_t grain = std::max<std::int64_t>(1, kGrain / kBlock);
    threads.run(rows * blocks, grain, [&](std::int64_t begin, std::int64_t end) {
      kernel.block_sums(batch, sums.data(), begin, end);
    });
    kernel.finish_rows(batch, sums.data(), gradients.data());
    if (batch.gradient)
      threads.run(rows * blocks, grain, [&](std::int64_t begin, std::int64_t end) {
        kernel.block_gradients(batch, sums.data(), gradients.data(), begin, end);
      });
  } else {
    threads.run(rows, std::max<std::int64_t>(1, kGrain / classes), [&](std::int64_t begin, std::int64_t end) {
      kernel.rows(batch, begin, end);
    });
  }
  const double sum = reduction == kNone ? 0 : sum_in_order(batch.loss, rows);
  return reduction == kMean ? sum / divisor : sum;
}

template <class S, class Threads>
void sums(const SumsBatch<S>& batch, const RowKernel<S>& kernel, const Threads& threads) {
  threads.run(batch.logits.rows, std::max<std::int64_t>(1, kGrain / batch.logits.classes),
              [&](std::int64_t begin, std::int64_t end) { kernel.row_sums(batch, begin, end); });
}

template <class S, class Threads>
void quantities(const QuantitiesBatch<S>& batch, const RowKernel<S>& kernel, const Threads& threads) {
  const std::int64_t rows = batch.logits.rows, classes = batch.logits.classes;
  const Targets& targets = batch.targets;
  for (std::int64_t row = 0; row < rows; ++row) {
    if (targets.ignored(row)) continue;
    require_class(targets.at(row, 0), row, classes, targets.ignore_index);
    for (std::int64_t t = 1; t < targets.count; ++t) require_further_class(targets.at(row, t), t, row, classes);
  }
  threads.run(rows, std::max<std::int64_t>(1, kGrain / classes),
              [&](std::int64_t begin, std::int64_t end) { kernel.row_quantities(batch, begin, end); });
}

// A gradient that is written block by block, by one function of the row kernel, from what a forward has left.
template <class Batch, class Blocks, class Threads>
void backward(const Batch& batch, const Blocks& blocks, const Threads& threads) {
  const std::int64_t rows = batch.logits.rows, classes = batch.logits.classes;
  advise_huge_pages(batch.gradient, rows * classes * static_cast<std::int64_t>(sizeof(*batch.gradient)));
  threads.run(rows * blocks_of(classes), std::max<std::int64_t>(1, kGrain / std::min(classes, kBlock)),
              [&](std::int64_t begin, std::int64_t end) { blocks(batch, begin, end); });
}

// The gradient from the fields of a forward.
template <class S, class Threads>
void recompute(
    const BackwardBatch<S>& batch, const RowKernel<S>& kernel, const Layouts* lanes, const Threads& threads) {
  if (!lanes) return backward(batch, kernel.recompute, threads);
  const std::int64_t rows = batch.logits.rows, classes = batch.logits.classes;
  advise_huge_pages(batch.gradient, rows * classes * static_cast<std::int64_t>(sizeof(S)));
  run_lanes(rows, classes, threads, [&](std::int64_t begin, std::int64_t end) {
    kernel.recompute_lanes(batch, *lanes, begin, end);
  });
}

}  // namespace dal
