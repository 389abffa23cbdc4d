// How a call is laid out on a device: one pure function of its size.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace dal {

struct Device {
  int capability;       // 90 for sm_90
  int multiprocessors;
};

struct Plan {
  ForwardKernel kernel;
  int threads;
  std::int64_t blocks;
  int log_lanes = 0;  // 2^this lanes share a row, where several rows share a warp
  int shares = 1;   // blocks that share a row
  bool cluster = false;
  int shared = 0;   // bytes of dynamic shared memory
};

// Threads of a block that keeps (part of) a row, so many values each; and of one that reads it in a loop.
constexpr int kRowThreads = 256, kRowValues = 128, kLoopThreads = 512;
// Portable clusters have at most so many blocks.
constexpr int kMostBlocks = 8;
// Vectors of a row that a thread of the backward makes, and classes of a row that lie apart.
constexpr int kBackwardShare = 4, kApartShare = 64;
// Warps that share 32 rows whose classes lie apart, and the classes of them that a lane keeps: the first so many where
// other warps can take the rest, else the second.
constexpr int kMostShares = 8, kApartValues = 32, kMostApartValues = 48;

inline std::int64_t ceil_div(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }
inline int whole_warps(std::int64_t threads) { return static_cast<int>(32 * ceil_div(threads, 32)); }

// Of a block that reads a row, or so many values of one, in a loop: four vectors a thread at a time.
inline int loop_threads(std::int64_t values, int width) {
  return whole_warps(std::min<std::int64_t>(kLoopThreads, ceil_div(values, 4 * width)));
}

// `whole`: rows of logits and gradient are made of whole aligned vectors. `gradient`: it is wanted. `wide`: the loss is
// one that sums over all classes, which only the looping kernels do.
inline Plan plan_forward(
    std::int64_t rows, std::int64_t classes, int itemsize, bool whole, bool gradient, bool wide, const Device& device) {
  using K = ForwardKernel;
  rows = std::max<std::int64_t>(1, rows);
  const int width = 16 / itemsize;
  // Values to keep, with those that an alignment may add.
  const std::int64_t values = width * ceil_div(classes + (whole ? 0 : width - 1), width);
  if (itemsize < 8 && !wide) {
    if (!whole && classes <= 32) {
      const int threads = whole_warps(std::min<std::int64_t>(128, rows));
      const K kernel = classes <= 4    ? K::short4
                       : classes <= 8  ? K::short8
                       : classes <= 10 ? K::short10
                       : classes <= 16 ? K::short16
                       : classes <= 24 ? K::short24
                                       : K::short32;
      return {kernel, threads, ceil_div(rows, threads), 0, 1, false,
              static_cast<int>(threads * classes * itemsize)};
    }
    if (values <= 32 * 64) {
      int log_lanes = 0;
      while ((64 << log_lanes) < values) ++log_lanes;
      const K kernel = !whole         ? K::lanes64
                       : values <= 8  ? K::lanes8w
                       : values <= 16 ? K::lanes16w
                       : values <= 32 ? K::lanes32w
                                      : K::lanes64w;
      return {kernel, 128, ceil_div(rows, 128 >> log_lanes), log_lanes};
    }
    if (values <= kRowThreads * kRowValues)
      return {whole ? K::block128w : K::block128, whole_warps(ceil_div(values, kRowValues)), rows};
    const std::int64_t shares = ceil_div(values, kRowThreads * kRowValues);
    if (device.capability >= 90 && shares <= kMostBlocks)
      return {whole ? K::cluster128w : K::cluster128,
              whole_warps(ceil_div(width * ceil_div(values / width, shares), kRowValues)), rows * shares, 0,
              static_cast<int>(shares), true};
  }
  const int threads = loop_threads(values, width);
  std::int64_t shares = 1;
  // Few rows would leave most of the device idle. Their gradient would too: it is better made in the backward.
  while (!gradient && rows * shares < 2 * device.multiprocessors && 2 * shares * threads * 4 * width <= values)
    shares *= 2;
  const K kernel = shares > 1 ? (wide ? K::split_rows_wide : K::split_rows) : (wide ? K::long_rows_wide : K::long_rows);
  return {kernel, threads, rows * shares, 0, static_cast<int>(shares)};
}

// Of rows whose classes lie apart, of which there are at most kMostApartValues kMostShares.
inline Plan plan_apart(std::int64_t rows, std::int64_t classes, bool wide) {
  using K = ForwardKernel;
  rows = std::max<std::int64_t>(1, rows);
  int log_shares = 0;
  while (1 << log_shares < kMostShares && std::int64_t(kApartValues) << log_shares < classes) ++log_shares;
  const std::int64_t values = ceil_div(classes, std::int64_t(1) << log_shares);
  const K kernel = wide ? (values <= kApartValues ? K::apart32_wide : K::apart48_wide)
                   : values <= 8  ? K::apart8
                   : values <= 16 ? K::apart16
                   : values <= 24 ? K::apart24
                   : values <= 32 ? K::apart32
                                  : K::apart48;
  const int groups = static_cast<int>(std::min<std::int64_t>(std::max(1, 4 >> log_shares), ceil_div(rows, 32)));
  return {kernel, (32 * groups) << log_shares, ceil_div(rows, 32 * groups), log_shares};
}

struct BackwardPlan {
  int lanes, threads;
  std::int64_t blocks, parts;
};

inline BackwardPlan plan_backward(std::int64_t rows, std::int64_t classes, int itemsize) {
  const int width = 16 / itemsize, threads = 256;
  const std::int64_t vectors = ceil_div(classes + width - 1, width);
  int lanes = 1;
  while (lanes < threads && lanes * kBackwardShare < vectors) lanes *= 2;
  return {lanes, threads, ceil_div(rows, threads / lanes), ceil_div(vectors, std::int64_t(lanes) * kBackwardShare)};
}

inline BackwardPlan plan_backward_apart(std::int64_t rows, std::int64_t classes) {
  const int threads = whole_warps(std::min<std::int64_t>(256, rows));
  return {1, threads, ceil_div(rows, threads), ceil_div(classes, kApartShare)};
}

// Threads of a block that sums up a row alone.
inline int plan_statistics(std::int64_t classes, int itemsize) {
  const int width = 16 / itemsize;
  return loop_threads(classes + width - 1, width);
}

struct RescalePlan {
  int threads;
  std::int64_t blocks;
};

// Mostly they find a factor of 1 and leave: a few threads with 16 vectors each, and no more than fill the device.
inline RescalePlan plan_rescale(std::int64_t size, int itemsize, const Device& device) {
  const std::int64_t lanes = ceil_div(size * itemsize, 16 * 16);
  const int threads = whole_warps(std::min<std::int64_t>(256, lanes));
  return {threads, std::min<std::int64_t>(ceil_div(lanes, threads), 8 * device.multiprocessors)};
}

}  // namespace dal
