// The row kernel whose lanes are rows: what is made once a row is made once for a vector of them. For rows too short to
// fill vectors, and for logits whose neighbours in memory are rows. In float: a row of doubles goes by row.h.
// Included by row.h, once an instruction set: no include guard.

#include "lane_tile.h"

using VectorSlopes = of_vectors::Slopes<RowVector>;

// RowSums without values of its own: the constructor that those would give it would lack the instruction set.
struct VectorSums {
  Vec<float> max, sum, weighted, differences, squares;
};

// f(lane) of the first `count` lanes, which others do not follow from; `rest` in the others.
template <class F> DAL_LANE Vec<float> lane_by_lane(std::int64_t count, float rest, const F& f) {
  float values[kRows];
  for (std::int64_t i = 0; i < kRows; ++i) values[i] = i < count ? f(i) : rest;
  return load_lanes(values);
}
DAL_LANE void store_first(float* to, Vec<float> v, std::int64_t count) {
  count == kRows ? store_lanes(to, v) : store_few_lanes(to, v, count);
}

// As block_sums_of has it of one row.
constexpr std::int64_t kRun = 64;
template <bool WIDE> DAL_LANE VectorSums vector_sums(const Tile& tile, std::int64_t lane) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  const float* z = tile.logits(lane);
  float* kept = tile.gradient(lane);
  Vec<float> max = splat(lowest);
  for (std::int64_t j = 0; j < tile.classes; ++j) max = larger<float>(max, load_lanes(z + j * tile.room));
  const Vec<float> base = max == lowest ? Vec<float>{} : max;
  VectorSums sums{max, {}, {}, {}, {}};
  // Run by run, because a lane that added up thousands of classes one after the other would round as often.
  for (std::int64_t begin = 0; begin < tile.classes; begin += kRun) {
    const std::int64_t end = std::min(begin + kRun, tile.classes);
    Vec<float> sum{}, weighted{}, differences{}, squares{};
    for (std::int64_t j = begin; j < end; ++j) {
      const Vec<float> difference = load_lanes(z + j * tile.room) - base;
      const Vec<float> d = at_least<float>(difference, Exp<float>::low), e = exp_of<float>(d);
      sum += e;
      weighted += e * d;
      if constexpr (WIDE) {
        differences += difference;
        squares += e * e;
      }
      store_lanes(kept + j * tile.room, e);
    }
    sums.sum += sum;
    sums.weighted += weighted;
    sums.differences += differences;
    sums.squares += squares;
  }
  return sums;
}

// As argmax has it: the first class that is NaN, else the first of the largest.
DAL_LANE IntVec<float> vector_argmax(const Tile& tile, std::int64_t lane, Vec<float> max) {
  const float* z = tile.logits(lane);
  IntVec<float> largest{}, poisoned = IntVec<float>{} - 1;
  for (std::int64_t j = tile.classes - 1; j >= 0; --j) {
    const Vec<float> v = load_lanes(z + j * tile.room);
    const IntVec<float> here = IntVec<float>{} + static_cast<std::int32_t>(j);
    largest = v == max ? here : largest;
    poisoned = v != v ? here : poisoned;
  }
  return poisoned < 0 ? largest : poisoned;
}

// Targets of a vector of rows. A row that is not counted has a loss and a gradient of 0; its target, and one that lies
// in no class, is -1.
struct VectorTargets {
  IntVec<float> target, counted;
};
DAL_LANE VectorTargets targets_at(const Target& target, std::int64_t classes, std::int64_t first, std::int64_t count) {
  VectorOf<std::int64_t, kRows * 8>::type y;
  if (target.stride == 1 && count == kRows) {
    std::memcpy(&y, target.data + first, sizeof(y));
  } else {
    std::int64_t given[kRows];
    for (std::int64_t i = 0; i < kRows; ++i) given[i] = i < count ? target.at(first + i) : target.ignore_index;
    std::memcpy(&y, given, sizeof(y));
  }
  const auto counted = y != target.ignore_index;
  return {__builtin_convertvector((y < classes) & counted ? y : y * 0 - 1, IntVec<float>),
          __builtin_convertvector(counted, IntVec<float>)};
}

// All that the gradient of a vector of rows needs besides their logits.
struct VectorGradient {
  of_vectors::AffineGradient<RowVector> affine;
  VectorTargets rows;
  IntVec<float> argmax;
};

// GradientBlock's form, in the place of the exponentials. ALONE: neither B nor u is in it.
template <bool WIDE, bool ALONE> DAL_LANE void write_vector(const VectorGradient& of, const Tile& tile, std::int64_t lane) {
  const auto& g = of.affine;
  const float* z = tile.logits(lane);
  float* out = tile.gradient(lane);
  for (std::int64_t j = 0; j < tile.classes; ++j) {
    const IntVec<float> here = IntVec<float>{} + static_cast<std::int32_t>(j);
    const Vec<float> e = load_lanes(out + j * tile.room);
    Vec<float> inner = g.A.lanes;
    if constexpr (!ALONE)
      inner += g.B.lanes * at_least<float>(load_lanes(z + j * tile.room) - g.max.lanes, Exp<float>::low);
    Vec<float> v;
    if constexpr (WIDE) v = e * (inner + g.E.lanes * e) + g.D.lanes;
    else v = e * inner;
    v = here == of.rows.target ? v - g.t.lanes : v;
    if constexpr (!ALONE) v = here == of.argmax ? v - g.u.lanes : v;
    store_lanes(out + j * tile.room, of.rows.counted ? v : Vec<float>{});
  }
}
template <bool WIDE> DAL_LANE void write_vector(const VectorGradient& of, const Tile& tile, std::int64_t lane) {
  const IntVec<float> more = (of.affine.B.lanes != 0.0f) | (of.affine.u.lanes != 0.0f);
  fold<Or, std::int32_t>(Or{}, more) ? write_vector<WIDE, false>(of, tile, lane) : write_vector<WIDE, true>(of, tile, lane);
}

// The knobs of a row.
struct RowKnobs {
  float of[kMostKnobs] = {};
  template <class S> RowKnobs(const ForwardBatch<S>& batch, std::int64_t row) {
    for (int k = 0; k < batch.knobs.count; ++k) of[k] = batch.knobs.template at<float>(row, k);
  }
  bool operator==(const RowKnobs& other) const { return std::equal(of, of + kMostKnobs, other.of); }
};

// One row after the other, of a loss that takes more than vectors have.
template <class S>
VectorSlopes slopes_of_each(
    const ForwardBatch<S>& batch, const of_vectors::RowSummary<RowVector>& rows, std::int64_t first, std::int64_t count) {
  using One = Slopes<float>;
  One one[kRows];
  for (std::int64_t i = 0; i < count; ++i) {
    const RowSummary<float> row{rows.target_log_prob.lanes[i], rows.max_log_prob.lanes[i], rows.entropy.lanes[i],
                                rows.sum_log_prob.lanes[i], rows.square_sum.lanes[i], rows.classes};
    one[i] = slopes_of(batch.objective, row, RowKnobs(batch, first + i).of, batch.log_classes);
  }
  const auto gather = [&](float One::*member) {
    return lane_by_lane(count, 0, [&](std::int64_t i) { return one[i].*member; });
  };
  return {gather(&One::loss), gather(&One::by_log_prob), gather(&One::by_entropy), gather(&One::by_max_log_prob),
          gather(&One::by_sum_log_prob), gather(&One::by_square_sum)};
}

// All rows that have the same knobs at once, so that a row has the same bits whether knobs are its own or everyone's.
template <class S>
VectorSlopes slopes_of_vector(
    const ForwardBatch<S>& batch, const of_vectors::RowSummary<RowVector>& rows, std::int64_t first, std::int64_t count) {
  VectorSlopes found{};
  bool done[kRows] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    if (done[i]) continue;
    const RowKnobs knobs(batch, first + i);
    VectorSlopes of{};
    if (!of_vectors::slopes_by_exponentials(batch.objective, rows, knobs.of, batch.log_classes, of))
      return slopes_of_each(batch, rows, first, count);
    if (batch.knobs.stride == 0) return of;
    RowMask same{};
    for (std::int64_t k = i; k < count; ++k)
      if (RowKnobs(batch, first + k) == knobs) {
        same.lanes[k] = -1;
        done[k] = true;
      }
    found = {select(same, of.loss, found.loss), select(same, of.by_log_prob, found.by_log_prob),
             select(same, of.by_entropy, found.by_entropy), select(same, of.by_max_log_prob, found.by_max_log_prob),
             select(same, of.by_sum_log_prob, found.by_sum_log_prob),
             select(same, of.by_square_sum, found.by_square_sum)};
  }
  return found;
}

// As finish_row has it of one row.
template <class S, bool WIDE>
VectorGradient finish_vector(const ForwardBatch<S>& batch, const Tile& tile, std::int64_t lane, const VectorSums& of) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  const std::int64_t first = tile.first + lane, count = std::min<std::int64_t>(kRows, tile.size - lane);
  const float classes = static_cast<float>(tile.classes);
  const of_vectors::RowSums<RowVector> sums{of.max, of.sum, of.weighted, of.differences, of.squares, classes};
  const VectorTargets targets = targets_at(batch.target, tile.classes, first, count);
  std::int32_t target[kRows];
  std::memcpy(target, &targets.target, sizeof(target));
  const Vec<float> target_logit = lane_by_lane(count, nan, [&](std::int64_t i) {
    return target[i] < 0 ? nan : tile.logits(lane + i)[target[i] * tile.room];
  });
  const auto summary = of_vectors::summarise(sums, RowVector(target_logit), classes);
  const VectorSlopes slopes = slopes_of_vector(batch, summary, first, count);
  RowVector weight = 1.0f;
  if (batch.weight)
    weight = lane_by_lane(count, 0, [&](std::int64_t i) {
      return target[i] < 0 ? 0 : batch.weight[target[i] * batch.weight_stride];
    });
  const Vec<float> loss = (weight * slopes.loss).lanes;
  store_first(batch.loss + first, targets.counted ? loss : Vec<float>{}, count);
  const bool seeks = batch.prediction || needs_argmax(batch.objective);
  const VectorGradient gradient{
      of_vectors::affine_gradient<WIDE>(sums, summary, slopes, weight * batch.gradient_scale), targets,
      seeks ? vector_argmax(tile, lane, of.max) : IntVec<float>{} - 1};
  if (batch.prediction)
    for (std::int64_t i = 0; i < count; ++i) batch.prediction[first + i] = gradient.argmax[i];
  if (batch.fields) {
    const auto& g = gradient.affine;
    const auto counted = [&](RowVector v) { return targets.counted ? v.lanes : Vec<float>{}; };
    const Vec<float> max_prob = exponential(summary.max_log_prob).lanes;
    const Vec<float> values[kFields] = {
        counted(g.max), counted(g.A), counted(g.B), counted(g.t), counted(g.u),
        exponential(summary.target_log_prob).lanes, summary.entropy.lanes,
        // Of a row of -inf alone nothing is known, as of its entropy.
        sums.sum.lanes > 0.0f ? max_prob : splat(nan), counted(g.E), counted(g.D)};
    for (int f = 0; f < (WIDE ? kFields : kNarrowFields); ++f)
      store_first(batch.fields + f * batch.logits.rows + first, values[f], count);
  }
  return gradient;
}

// Step by step, so that the long chains of operations of one vector of rows overlap with its neighbours'.
template <class S, bool WIDE>
void lane_rows_of(const ForwardBatch<S>& batch, const Layouts& layouts, std::int64_t begin, std::int64_t end) {
  Tile tile(batch.logits.classes);
  VectorSums sums[kMostRows / kRows];
  for (tile.first = begin; tile.first < end; tile.first += tile.room) {
    tile.size = std::min(tile.room, end - tile.first);
    tile.load(batch.logits.data, layouts.logits, batch.logits.rows);
    for (std::int64_t lane = 0; lane < tile.size; lane += kRows) sums[lane / kRows] = vector_sums<WIDE>(tile, lane);
    for (std::int64_t lane = 0; lane < tile.size; lane += kRows) {
      const VectorGradient gradient = finish_vector<S, WIDE>(batch, tile, lane, sums[lane / kRows]);
      if (batch.gradient) write_vector<WIDE>(gradient, tile, lane);
    }
    if (batch.gradient) tile.store(batch.gradient, layouts.gradient);
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
  Tile tile(batch.logits.classes);
  for (tile.first = begin; tile.first < end; tile.first += tile.room) {
    tile.size = std::min(tile.room, end - tile.first);
    tile.load(batch.logits.data, layouts.logits, batch.logits.rows);
    for (std::int64_t lane = 0; lane < tile.size; lane += kRows) {
      const std::int64_t first = tile.first + lane, count = std::min<std::int64_t>(kRows, tile.size - lane);
      const auto field = [&](Field f) -> RowVector {
        const float* from = batch.fields + f * batch.logits.rows + first;
        return count == kRows ? load_lanes(from) : load_few_lanes(from, count);
      };
      const RowVector up =
          lane_by_lane(count, 0, [&](std::int64_t i) { return batch.upstream[(first + i) * batch.upstream_stride]; });
      VectorGradient gradient{{field(kMax), up * field(kScale), up * field(kSlope), up * field(kTargetTerm)},
                              targets_at(batch.target, tile.classes, first, count),
                              IntVec<float>{} - 1};
      if (batch.prediction) {
        gradient.affine.u = up * field(kArgmaxTerm);
        for (std::int64_t i = 0; i < count; ++i)
          gradient.argmax[i] = static_cast<std::int32_t>(std::min(batch.prediction[first + i], tile.classes));
      }
      if constexpr (WIDE) {
        gradient.affine.E = up * field(kSquare);
        gradient.affine.D = up * field(kConstant);
      }
      const Vec<float> max = gradient.affine.max.lanes;
      for (std::int64_t j = 0; j < tile.classes; ++j) {
        const Vec<float> d = load_lanes(tile.logits(lane) + j * tile.room) - max;
        store_lanes(tile.gradient(lane) + j * tile.room, exp_of<float>(at_least<float>(d, Exp<float>::low)));
      }
      write_vector<WIDE>(gradient, tile, lane);
    }
    tile.store(batch.gradient, layouts.gradient);
  }
}
template <class S>
void recompute_lanes(const BackwardBatch<S>& batch, const Layouts& layouts, std::int64_t begin, std::int64_t end) {
  batch.wide ? recompute_lanes_of<S, true>(batch, layouts, begin, end)
             : recompute_lanes_of<S, false>(batch, layouts, begin, end);
}
