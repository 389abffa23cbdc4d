// The row kernel whose lanes are rows: what is made once a row is made once for a vector of them. For rows too short to
// fill vectors, and for logits whose neighbours in memory are rows. In float: a row of doubles goes by row.h.
// Included by row.h, once an instruction set: no include guard.

#include "lane_tile.h"

using RowsSums = of_vectors::RowSums<RowVector>;
using RowsSummary = of_vectors::RowSummary<RowVector>;
using RowsSlopes = of_vectors::Slopes<RowVector>;

// f(lane) of the first `count` lanes, which others do not follow from; `rest` in the others. Of all lanes without an array,
// because a vector that is read from numbers stored one by one waits until the last of them has reached the cache.
template <class F, int... I> DAL_LANE RowVector each_lane(const F& f, std::integer_sequence<int, I...>) {
  return {Vec<float>{f(I)...}, Vec<float>{f(I + kSide)...}};
}
template <class F> DAL_LANE RowVector lane_by_lane(std::int64_t count, float rest, const F& f) {
  if (count == kRows) return each_lane(f, std::make_integer_sequence<int, kSide>{});
  float values[kRows];
  for (std::int64_t i = 0; i < kRows; ++i) values[i] = i < count ? f(i) : rest;
  return load_rows(values);
}
DAL_LANE RowVector load_first(const float* from, std::int64_t count) {
  return lane_by_lane(count, 0, [&](std::int64_t i) { return from[i]; });
}
DAL_LANE void store_first(float* to, RowVector v, std::int64_t count) {
  if (count == kRows) return store_rows(to, v);
  float values[kRows];
  store_rows(values, v);
  for (std::int64_t i = 0; i < count; ++i) to[i] = values[i];
}

// Sums without values of their own: the constructor that those would give it would lack the instruction set.
struct TileSums {
  RowVector max, sum, weighted, differences, squares;
};

// As block_sums_of has it of one row.
constexpr std::int64_t kRun = 64;
template <bool WIDE> DAL_LANE TileSums vector_sums(const Tile& tile, std::int64_t lane) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  const float* z = tile.logits(lane);
  float* kept = tile.gradient(lane);
  RowVector max = lowest;
  for (std::int64_t j = 0; j < tile.classes; ++j) max = larger(max, load_rows(z + j * tile.stride));
  const RowVector base = select(max == lowest, RowVector(0.0f), max);
  TileSums sums{max, 0.0f, 0.0f, 0.0f, 0.0f};
  // Run by run, because a lane that added up thousands of classes one after the other would round as often.
  for (std::int64_t begin = 0; begin < tile.classes; begin += kRun) {
    const std::int64_t end = std::min(begin + kRun, tile.classes);
    RowVector sum = 0.0f, weighted = 0.0f, differences = 0.0f, squares = 0.0f;
    for (std::int64_t j = begin; j < end; ++j) {
      const RowVector difference = load_rows(z + j * tile.stride) - base;
      const RowVector d = at_least(difference, Exp<float>::low), e = exp_of(d);
      sum += e;
      weighted += e * d;
      if constexpr (WIDE) {
        differences += difference;
        squares += e * e;
      }
      store_rows(kept + j * tile.stride, e);
    }
    sums.sum += sum;
    sums.weighted += weighted;
    sums.differences += differences;
    sums.squares += squares;
  }
  return sums;
}

// As argmax has it: the first class that is NaN, else the first of the largest.
DAL_LANE RowInts vector_argmax(const Tile& tile, std::int64_t lane, RowVector max) {
  const float* z = tile.logits(lane);
  RowInts largest = row_ints(0), poisoned = row_ints(-1);
  for (std::int64_t j = tile.classes - 1; j >= 0; --j) {
    const RowVector v = load_rows(z + j * tile.stride);
    const RowInts here = row_ints(static_cast<std::int32_t>(j));
    largest = select(v == max, here, largest);
    poisoned = select(v != v, here, poisoned);
  }
  return select(poisoned < row_ints(0), largest, poisoned);
}

// Vectors of rows whose steps are taken together, so that the long chains of operations of one overlap with the others'.
constexpr std::int64_t kTogether = 4 * kRows;

// The targets of rows [begin, begin + kTogether) of a tile: -1 of one that is not counted, whose loss and gradient are 0,
// and C of one that lies in no class. Number by number and before they are needed, because 64 bits fill vectors of
// another length than logits do.
struct BlockTargets {
  std::int32_t classes[kTogether];
  void read(const Target& target, const Tile& tile, std::int64_t begin) {
    const std::int64_t count = std::min(kTogether, tile.size - begin);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t y = target.at(tile.first + begin + i);
      classes[i] = static_cast<std::int32_t>(y == target.ignore_index ? -1 : std::min(y, tile.classes));
    }
    for (std::int64_t i = count; i < kTogether; ++i) classes[i] = -1;
  }
  DAL_LANE RowInts at(std::int64_t i) const { return load_ints(classes + i); }
};

// All that the gradient of a vector of rows needs besides their logits.
struct VectorGradient {
  of_vectors::AffineGradient<RowVector> affine;
  RowInts target, argmax;
};

// GradientBlock's form, in the place of the exponentials. ALONE: neither B nor u is in it.
template <bool WIDE, bool ALONE>
DAL_LANE void write_vector(const VectorGradient& gradient, const Tile& tile, std::int64_t lane) {
  const auto& g = gradient.affine;
  const float* z = tile.logits(lane);
  float* out = tile.gradient(lane);
  const RowMask counted = row_ints(-1) < gradient.target;
  for (std::int64_t j = 0; j < tile.classes; ++j) {
    const RowInts here = row_ints(static_cast<std::int32_t>(j));
    const RowVector e = load_rows(out + j * tile.stride);
    RowVector inner = g.A;
    if constexpr (!ALONE) inner += g.B * at_least(load_rows(z + j * tile.stride) - g.max, Exp<float>::low);
    RowVector v;
    if constexpr (WIDE) v = e * (inner + g.E * e) + g.D;
    else v = e * inner;
    v -= kept_where(here == gradient.target, g.t);
    if constexpr (!ALONE) v -= kept_where(here == gradient.argmax, g.u);
    store_rows(out + j * tile.stride, kept_where(counted, v));
  }
}
template <bool WIDE> DAL_LANE void write_vector(const VectorGradient& gradient, const Tile& tile, std::int64_t lane) {
  const bool more = any((gradient.affine.B != 0.0f) | (gradient.affine.u != 0.0f));
  more ? write_vector<WIDE, false>(gradient, tile, lane) : write_vector<WIDE, true>(gradient, tile, lane);
}

// The knobs of a row.
struct RowKnobs {
  float values[kMostKnobs] = {};
  template <class S> RowKnobs(const ForwardBatch<S>& batch, std::int64_t row) {
    for (int k = 0; k < batch.knobs.count; ++k) values[k] = batch.knobs.template at<float>(row, k);
  }
  bool operator==(const RowKnobs& other) const { return std::equal(values, values + kMostKnobs, other.values); }
};

// The losses of a vector of rows with the same knobs. Called, so that the library holds them once an instruction set and
// not once a storage type besides.
__attribute__((noinline)) RowsSlopes slopes_of_alike(
    std::int64_t objective, const RowsSummary& rows, const RowKnobs& knobs, float log_classes) {
  return of_vectors::slopes_of(objective, rows, knobs.values, log_classes);
}

// Where knobs are a row's own: all rows that have the same ones at once, so that a row has the same bits whether knobs are
// its own or everyone's.
template <class S>
RowsSlopes slopes_by_knobs(
    const ForwardBatch<S>& batch, const RowsSummary& rows, std::int64_t first, std::int64_t count) {
  RowsSlopes found{};
  bool done[kRows] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    if (done[i]) continue;
    const RowKnobs knobs(batch, first + i);
    const RowsSlopes slopes = slopes_of_alike(batch.objective, rows, knobs, batch.log_classes);
    std::int32_t marks[kRows] = {};
    for (std::int64_t k = i; k < count; ++k)
      if (RowKnobs(batch, first + k) == knobs) {
        marks[k] = -1;
        done[k] = true;
      }
    RowMask same;
    std::memcpy(&same, marks, sizeof(same));
    found = {select(same, slopes.loss, found.loss), select(same, slopes.by_log_prob, found.by_log_prob),
             select(same, slopes.by_entropy, found.by_entropy),
             select(same, slopes.by_max_log_prob, found.by_max_log_prob),
             select(same, slopes.by_sum_log_prob, found.by_sum_log_prob),
             select(same, slopes.by_square_sum, found.by_square_sum)};
  }
  return found;
}

// As finish_row has it of one row, and the gradient. `target_logit`: of rows that are not counted any number.
template <class S, bool WIDE>
void finish_vector(
    const ForwardBatch<S>& batch, const Tile& tile, std::int64_t lane, const TileSums& tile_sums, RowInts target,
    RowVector target_logit) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  const std::int64_t first = tile.first + lane, count = std::min<std::int64_t>(kRows, tile.size - lane);
  const float classes = static_cast<float>(tile.classes);
  const RowsSums sums{
      tile_sums.max, tile_sums.sum, tile_sums.weighted, tile_sums.differences, tile_sums.squares, classes};
  const RowMask ignored = target < row_ints(0);
  const RowsSummary summary = of_vectors::summarise(sums, select(ignored, RowVector(nan), target_logit), classes);
  const RowsSlopes slopes =
      batch.knobs.stride == 0 ? slopes_of_alike(batch.objective, summary, RowKnobs(batch, first), batch.log_classes)
                              : slopes_by_knobs(batch, summary, first, count);
  RowVector weight = 1.0f;
  if (batch.weight)
    weight = lane_by_lane(count, 0, [&](std::int64_t i) {
      const std::int64_t y = batch.target.at(first + i);
      return y == batch.target.ignore_index ? 0 : batch.weight[y * batch.weight_stride];
    });
  const auto counted = [&](RowVector v) { return select(ignored, RowVector(0.0f), v); };
  store_first(batch.loss + first, counted(weight * slopes.loss), count);
  const bool seeks = batch.prediction || needs_argmax(batch.objective);
  const VectorGradient gradient{
      of_vectors::affine_gradient<WIDE>(sums, summary, slopes, weight * batch.gradient_scale), target,
      seeks ? vector_argmax(tile, lane, tile_sums.max) : row_ints(-1)};
  if (batch.prediction) {
    std::int32_t found[kRows];
    std::memcpy(found, &gradient.argmax, sizeof(found));
    for (std::int64_t i = 0; i < count; ++i) batch.prediction[first + i] = found[i];
  }
  if (batch.fields) {
    const auto& g = gradient.affine;
    // Of a row of -inf alone nothing is known, as of its entropy.
    const RowVector max_prob = select(sums.sum > 0.0f, exponential(summary.max_log_prob), RowVector(nan));
    const RowVector values[kFields] = {
        counted(g.max), counted(g.A), counted(g.B), counted(g.t), counted(g.u),
        exponential(summary.target_log_prob), summary.entropy, max_prob, counted(g.E), counted(g.D)};
    for (int f = 0; f < (WIDE ? kFields : kNarrowFields); ++f)
      store_first(batch.fields + f * batch.logits.rows + first, values[f], count);
  }
  if (batch.gradient) write_vector<WIDE>(gradient, tile, lane);
}

template <class S, bool WIDE>
void lane_rows_of(const ForwardBatch<S>& batch, const Layouts& layouts, std::int64_t begin, std::int64_t end) {
  Tile tile(begin, end, batch.logits.classes, layouts.logits);
  TileSums sums[kTogether / kRows];
  BlockTargets targets;
  float target_logits[kTogether] = {};
  for (; tile.size > 0; tile.advance()) {
    tile.load(batch.logits.data, layouts.logits, batch.logits.rows);
    for (std::int64_t block = 0; block < tile.size; block += kTogether) {
      const std::int64_t size = std::min(kTogether, tile.size - block);
      targets.read(batch.target, tile, block);
      for (std::int64_t i = 0; i < size; ++i)
        target_logits[i] = tile.logits(block + i)[std::max(targets.classes[i], 0) * tile.stride];
      for (std::int64_t i = 0; i < size; i += kRows) sums[i / kRows] = vector_sums<WIDE>(tile, block + i);
      for (std::int64_t i = 0; i < size; i += kRows)
        finish_vector<S, WIDE>(batch, tile, block + i, sums[i / kRows], targets.at(i), load_rows(target_logits + i));
    }
    if (batch.gradient) tile.store(batch.gradient, layouts.gradient, end);
  }
}
template <class S>
void lane_rows(const ForwardBatch<S>& batch, const Layouts& layouts, std::int64_t begin, std::int64_t end) {
  is_wide(batch.objective) ? lane_rows_of<S, true>(batch, layouts, begin, end)
                           : lane_rows_of<S, false>(batch, layouts, begin, end);
}

// As recompute_of has it of a block.
template <class S, bool WIDE>
void recompute_lanes_of(const BackwardBatch<S>& batch, const Layouts& layouts, std::int64_t begin, std::int64_t end) {
  Tile tile(begin, end, batch.logits.classes, layouts.logits);
  BlockTargets targets;
  // In the place of the logits, rows behind these are written by another thread meanwhile, and those of the next tile are
  // not read yet.
  const bool in_place = batch.gradient == batch.logits.data;
  for (; tile.size > 0; tile.advance()) {
    tile.load(batch.logits.data, layouts.logits, in_place ? end : batch.logits.rows);
    for (std::int64_t lane = 0; lane < tile.size; lane += kRows) {
      const std::int64_t first = tile.first + lane, count = std::min<std::int64_t>(kRows, tile.size - lane);
      if (lane % kTogether == 0) targets.read(batch.target, tile, lane);
      const auto field = [&](Field f) { return load_first(batch.fields + f * batch.logits.rows + first, count); };
      const RowVector up =
          lane_by_lane(count, 0, [&](std::int64_t i) { return batch.upstream[(first + i) * batch.upstream_stride]; });
      VectorGradient gradient{{field(kMax), up * field(kScale), up * field(kSlope), up * field(kTargetTerm)},
                              targets.at(lane % kTogether), row_ints(-1)};
      if (batch.prediction) {
        gradient.affine.u = up * field(kArgmaxTerm);
        std::int32_t argmax[kRows] = {};
        for (std::int64_t i = 0; i < count; ++i)
          argmax[i] = static_cast<std::int32_t>(std::clamp<std::int64_t>(batch.prediction[first + i], -1, tile.classes));
        std::memcpy(&gradient.argmax, argmax, sizeof(argmax));
      }
      if constexpr (WIDE) {
        gradient.affine.E = up * field(kSquare);
        gradient.affine.D = up * field(kConstant);
      }
      const RowVector max = gradient.affine.max;
      for (std::int64_t j = 0; j < tile.classes; ++j) {
        const RowVector d = load_rows(tile.logits(lane) + j * tile.stride) - max;
        store_rows(tile.gradient(lane) + j * tile.stride, exp_of(at_least(d, Exp<float>::low)));
      }
      write_vector<WIDE>(gradient, tile, lane);
    }
    tile.store(batch.gradient, layouts.gradient, in_place ? tile.first + tile.size : end);
  }
}
template <class S>
void recompute_lanes(const BackwardBatch<S>& batch, const Layouts& layouts, std::int64_t begin, std::int64_t end) {
  batch.wide ? recompute_lanes_of<S, true>(batch, layouts, begin, end)
             : recompute_lanes_of<S, false>(batch, layouts, begin, end);
}
