// The CPU row kernel: sums, objective, affine gradient, on a row that stays in cache.
// Included once an instruction set, inside its namespace, after lanes.h: no include guard.

// Blocks of one row, or the part of a batch of rows, that begin at class `first`.
struct Span {
  std::int64_t first, size;
};
DAL_LANE Span block_span(std::int64_t block, std::int64_t classes) {
  const std::int64_t first = block * kBlock;
  return {first, std::min(kBlock, classes - first)};
}

// f(position, count): whole packs first, then the ragged end. The count is a constant for whole packs.
template <class S, class F> DAL_LANE void for_packs(std::int64_t size, const F& f) {
  std::int64_t j = 0;
  for (; j + kPack<S> <= size; j += kPack<S>) f(j, std::integral_constant<int, kPack<S>>{});
  if (j < size) f(j, static_cast<int>(size - j));
}
template <class S, int N>
DAL_LANE Pack<S> get(const S* from, std::integral_constant<int, N>, Arithmetic<S>) { return load(from); }
template <class S> DAL_LANE Pack<S> get(const S* from, int n, Arithmetic<S> rest) { return load_few(from, n, rest); }
template <class S, int N>
DAL_LANE void put(S* to, const Pack<S>& pack, std::integral_constant<int, N>) { store(to, pack); }
template <class S> DAL_LANE void put(S* to, const Pack<S>& pack, int n) { store_few(to, pack, n); }

// The largest logit that is not NaN. Four chains hide the latency of max.
template <class S> DAL_LANE Arithmetic<S> block_max(const S* z, std::int64_t size) {
  using A = Arithmetic<S>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  constexpr int W = kPack<S>;
  Vec<A> best[4] = {splat(lowest), splat(lowest), splat(lowest), splat(lowest)};
  std::int64_t j = 0;
  for (; j + 4 * W <= size; j += 4 * W)
    for (int k = 0; k < 4; ++k)
      for (const Vec<A>& v : load(z + j + k * W).part) best[k] = larger<A>(best[k], v);
  for_packs<S>(size - j, [&](std::int64_t i, auto n) {
    for (const Vec<A>& v : get(z + j + i, n, lowest).part) best[0] = larger<A>(best[0], v);
  });
  return max_of<A>(larger<A>(larger<A>(best[0], best[1]), larger<A>(best[2], best[3])));
}

// Whether exponentials are kept in the gradient itself: they have its type. Else they are kept in scratch, part by
// part, and the last pack whole.
template <class S> constexpr bool in_gradient = std::is_same_v<S, Arithmetic<S>>;
template <class S, class N> DAL_LANE void keep(Arithmetic<S>* to, const Pack<S>& pack, N n) {
  if constexpr (in_gradient<S>) put(to, pack, n);
  else
    for (int p = 0; p < kVectors<S>; ++p) store(to + p * kLanes<float>, Pack<float>{{pack.part[p]}});
}
template <class S, class N> DAL_LANE Pack<S> recall(const Arithmetic<S>* from, N n) {
  Pack<S> pack;
  if constexpr (in_gradient<S>) pack = get(from, n, S(0));
  else
    for (int p = 0; p < kVectors<S>; ++p) pack.part[p] = load(from + p * kLanes<float>).part[0];
  return pack;
}

// m = max z,  S = sum e^(z-m),  W = sum e^(z-m) (z-m), with WIDE D = sum (z-m) and P = sum e^2(z-m), and with KEEP the
// e^(z-m) themselves. NaN and +inf make S NaN by themselves (+inf - +inf); -inf gives e = 0 and a finite, clamped z - m,
// so 0 in W.
template <class S, bool KEEP, bool WIDE>
DAL_LANE RowSums<Arithmetic<S>> block_sums_of(const S* z, std::int64_t size, Arithmetic<S>* kept) {
  using A = Arithmetic<S>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const A max = block_max(z, size);
  const Vec<A> base = splat(max == lowest ? A(0) : max);
  Vec<A> sum{}, weighted{}, differences{}, squares{};
  for_packs<S>(size, [&](std::int64_t j, auto n) {
    // What comes next, while the arithmetic leaves memory idle. It may lie past the end: that is no access.
    __builtin_prefetch(z + j + size, 0, 2);
    if (KEEP && in_gradient<S>) __builtin_prefetch(kept + j + size, 1, 2);
    Pack<S> pack = get(z + j, n, lowest);
    if constexpr (WIDE) {  // positions past the end must add nothing
      const Pack<S> own = get(z + j, n, base[0]);
      for (const Vec<A>& v : own.part) differences += v - base;
    }
    for (Vec<A>& v : pack.part) {
      const Vec<A> d = at_least<A>(v - base, Exp<A>::low);
      v = exp_of<A>(d);
      sum += v;
      weighted += v * d;
      if constexpr (WIDE) squares += v * v;
    }
    if (KEEP) keep<S>(kept + j, pack, n);
  });
  if constexpr (WIDE)
    return {max, sum_of<A>(sum), sum_of<A>(weighted), sum_of<A>(differences), sum_of<A>(squares), static_cast<A>(size)};
  return {max, sum_of<A>(sum), sum_of<A>(weighted), A(0), A(0), static_cast<A>(size)};
}

// First class whose logit equals `value` (or is NaN, with `value` NaN), or `size`. Chunks that have none are passed over
// without asking where.
template <class S> DAL_LANE std::int64_t first_equal(const S* z, std::int64_t size, Arithmetic<S> value) {
  using A = Arithmetic<S>;
  using I = typename LaneTypes<A>::Int;
  constexpr std::int64_t chunk = 8 * kPack<S>;
  const Vec<A> wanted = splat(value);
  const bool nan = value != value;
  const auto hits = [&](Vec<A> v) -> IntVec<A> { return nan ? v != v : v == wanted; };
  std::int64_t begin = 0;
  for (; begin + chunk <= size; begin += chunk) {
    IntVec<A> any{};
    for (std::int64_t j = begin; j < begin + chunk; j += kPack<S>)
      for (const Vec<A>& v : load(z + j).part) any |= hits(v);
    if (fold<Or, I>(Or{}, any)) break;
  }
  IntVec<A> lane, first = IntVec<A>{} + I(kBlock);
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i * kVectors<S>;
  for_packs<S>(std::min(chunk, size - begin), [&](std::int64_t j, auto n) {
    const Pack<S> pack = get(z + begin + j, n, nan ? A(0) : std::numeric_limits<A>::quiet_NaN());
    for (int p = 0; p < kVectors<S>; ++p) {
      const IntVec<A> here = lane + I(j + p);
      first = ((hits(pack.part[p]) != 0) & (here < first)) ? here : first;
    }
  });
  I best = kBlock;
  for (int i = 0; i < kLanes<A>; ++i) best = first[i] < best ? first[i] : best;
  return std::min<std::int64_t>(begin + best, size);
}

// The class torch.argmax names: the first NaN, else the first maximum.
template <class S>
std::int64_t argmax(const S* z, std::int64_t classes, const RowSums<Arithmetic<S>>* blocks,
                    const RowSums<Arithmetic<S>>& row) {
  using A = Arithmetic<S>;
  const auto find = [&](A value, bool everywhere) {
    for (std::int64_t b = 0; b * kBlock < classes; ++b) {
      const Span span = block_span(b, classes);
      if (!everywhere && blocks[b].max != value) continue;
      const std::int64_t at = first_equal(z + span.first, span.size, value);
      if (at < span.size) return span.first + at;
    }
    return std::int64_t(-1);
  };
  if (row.sum != row.sum) {
    const std::int64_t at = find(std::numeric_limits<A>::quiet_NaN(), true);
    if (at >= 0) return at;
  }
  return find(row.max, false);
}

// dL/dz_j = e_j (A + B (z_j - m)) - t [j = y] - u [j = k*], with WIDE and e_j E in the brackets and + D behind them,
// with e_j = ratio e^(z_j - base): e^(z_j - base) is either KEPT by the first pass, base being its block's maximum, or
// computed again. Rounded once, at the store.
template <class S, bool WIDE> struct GradientBlock {
  using A = Arithmetic<S>;
  const RowGradient<A>& row;
  // Values: a store to the gradient might change what is only referred to.
  const Vec<A> max, base, scale, slope, square, constant;

  DAL_LANE GradientBlock(const RowGradient<A>& row, A base, A ratio)
      : row(row), max(splat(row.affine.max)), base(splat(base)), scale(splat(row.affine.A * ratio)),
        slope(splat(row.affine.B * ratio)), square(splat(row.affine.E * ratio * ratio)), constant(splat(row.affine.D)) {}

  DAL_LANE Vec<A> exponentials(Vec<A> z) const { return exp_of<A>(at_least<A>(z - base, Exp<A>::low)); }
  DAL_LANE Vec<A> affine(Vec<A> z, Vec<A> e) const {
    const Vec<A> inner = scale + slope * at_least<A>(z - max, Exp<A>::low);
    if constexpr (WIDE) return e * (inner + square * e) + constant;
    return e * inner;
  }
  template <bool KEPT> DAL_LANE void write_affine(const S* z, const A* kept, S* out, std::int64_t size) const {
    for_packs<S>(size, [&](std::int64_t j, auto n) {
      if (!KEPT) __builtin_prefetch(z + j + size, 0, 2);
      if (!KEPT || !in_gradient<S>) __builtin_prefetch(out + j + size, 1, 2);
      Pack<S> pack = get(z + j, n, A(0));
      Pack<S> e;
      if constexpr (KEPT) e = recall<S>(kept + j, n);
      for (int p = 0; p < kVectors<S>; ++p)
        pack.part[p] = affine(pack.part[p], KEPT ? e.part[p] : exponentials(pack.part[p]));
      put(out + j, pack, n);
    });
  }
  // B = 0 needs no logits.
  DAL_LANE void write_scaled(const A* kept, S* out, std::int64_t size) const {
    for_packs<S>(size, [&](std::int64_t j, auto n) {
      Pack<S> pack = recall<S>(kept + j, n);
      for (Vec<A>& v : pack.part) {
        if constexpr (WIDE) v = v * (scale + square * v) + constant;
        else v *= scale;
      }
      put(out + j, pack, n);
    });
  }

  // z, kept, out: of this block. `out` may be `z` or `kept`, so the two special classes are computed first.
  DAL_LANE void write(const S* z, const A* kept, S* out, Span span) const {
    const std::int64_t special[2] = {row.target - span.first, row.argmax - span.first};
    const bool inside[2] = {special[0] >= 0 && special[0] < span.size,
                            row.affine.u != A(0) && special[1] >= 0 && special[1] < span.size};
    A value[2] = {};
    for (int i = 0; i < 2; ++i) {
      if (!inside[i]) continue;
      const std::int64_t j = special[i];
      const Vec<A> logit = splat(load_one(z + j));
      value[i] = affine(logit, exponentials(logit))[0];
      if (j == special[0]) value[i] -= row.affine.t;
      if (j == special[1]) value[i] -= row.affine.u;
    }
    if (!kept)
      write_affine<false>(z, nullptr, out, span.size);
    else if (row.affine.B == A(0))
      write_scaled(kept, out, span.size);
    else
      write_affine<true>(z, kept, out, span.size);
    for (int i = 0; i < 2; ++i)
      if (inside[i]) store_one(out + special[i], value[i]);
  }
};

// Gradient of one block of a row. Null `kept`: the exponentials are computed again.
template <class S, bool WIDE> DAL_LANE void write_gradient(
    const RowGradient<Arithmetic<S>>& row, const S* z, const Arithmetic<S>* kept, Arithmetic<S> block_max, S* out,
    Span span) {
  using A = Arithmetic<S>;
  if (row.target < 0) {
    std::memset(static_cast<void*>(out), 0, span.size * sizeof(S));
    return;
  }
  // A block of -inf alone has nothing to move: its exponentials are 0 whatever the base.
  const bool moved = block_max != row.affine.max && block_max != -std::numeric_limits<A>::infinity();
  const A base = moved ? block_max : row.affine.max;
  GradientBlock<S, WIDE>(row, base, moved ? std::exp(block_max - row.affine.max) : A(1)).write(z, kept, out, span);
}

template <class A> DAL_LANE RowSums<A> merged(const RowSums<A>* blocks, std::int64_t count) {
  RowSums<A> sums = blocks[0];
  for (std::int64_t b = 1; b < count; ++b) sums = merge(sums, blocks[b]);
  return sums;
}

// Merged sums -> loss, fields and prediction of one row, and what its gradient needs.
template <class S, bool WIDE>
RowGradient<Arithmetic<S>> finish_row(
    const ForwardBatch<S>& batch, std::int64_t row, const RowSums<Arithmetic<S>>* blocks) {
  using A = Arithmetic<S>;
  const S* z = batch.logits.row(row);
  const std::int64_t classes = batch.logits.classes;
  const bool ignored = batch.target.ignored(row);
  const std::int64_t target = ignored ? -1 : batch.target.at(row);

  const RowSums<A> sums = merged(blocks, blocks_of(classes));
  const A target_logit = ignored ? std::numeric_limits<A>::quiet_NaN() : load_one(z + target);
  const RowSummary<A> summary = summarise(sums, target_logit, static_cast<A>(classes));

  RowGradient<A> gradient{{}, target, -1};
  if (batch.prediction || needs_argmax(batch.objective)) gradient.argmax = argmax(z, classes, blocks, sums);
  batch.loss[row] = 0;
  if (!ignored) {
    A knobs[kMostKnobs];
    for (int k = 0; k < batch.knobs.count; ++k) knobs[k] = batch.knobs.template at<A>(row, k);
    const Slopes<A> slopes = slopes_of(batch.objective, summary, knobs, batch.log_classes);
    const A weight = batch.weight ? batch.weight[target * batch.weight_stride] : A(1);
    batch.loss[row] = weight * slopes.loss;
    gradient.affine = affine_gradient<WIDE>(sums, summary, slopes, weight * batch.gradient_scale);
  }
  if (batch.prediction) batch.prediction[row] = gradient.argmax;
  if (batch.fields) {
    const AffineGradient<A>& g = gradient.affine;
    const A values[kFields] = {g.max, g.A, g.B, g.t, g.u, std::exp(summary.target_log_prob), summary.entropy, g.E, g.D};
    for (int f = 0; f < (WIDE ? kFields : kNarrowFields); ++f) batch.fields[f * batch.logits.rows + row] = values[f];
  }
  return gradient;
}

// A longer row has left the core's own cache when its gradient is written: its exponentials cost less to make again.
constexpr std::int64_t kCached = 32 * kBlock;

// Where exponentials wait for the row's coefficients where there is no scratch for them: in the gradient itself if it
// has their type, else nowhere (null), and they are computed again. The gradient has the same bits either way.
template <class S> DAL_LANE Arithmetic<S>* room_in(S* gradient, std::int64_t classes) {
  if constexpr (in_gradient<S>) return classes > kCached ? nullptr : gradient;
  return nullptr;
}

template <class S, bool WIDE>
DAL_LANE RowSums<Arithmetic<S>> read_block(const S* z, Span span, Arithmetic<S>* kept) {
  return kept ? block_sums_of<S, true, WIDE>(z + span.first, span.size, kept + span.first)
              : block_sums_of<S, false, WIDE>(z + span.first, span.size, nullptr);
}

// Scratch of a longer row must be small beside the gradient that the rows of a thread make, and fit its own cache.
constexpr std::int64_t kScratch = 16 * kBlock;

// Short rows go through in groups, step by step: the long chain of dependent operations of one row (maximum, sum,
// logarithm, coefficients) then overlaps with its neighbours'. A group's rows together fit a block.
constexpr std::int64_t kGroup = 16;

template <class S, bool WIDE> void rows_of(const ForwardBatch<S>& batch, std::int64_t begin, std::int64_t end) {
  using A = Arithmetic<S>;
  const std::int64_t classes = batch.logits.classes, count = blocks_of(classes);
  const std::int64_t group = std::max<std::int64_t>(1, std::min(kGroup, kBlock / classes));
  const bool roomy = group * classes <= kBlock || (classes <= kScratch && end - begin >= 32);
  const bool scratch = batch.gradient && roomy && !in_gradient<S>;
  const std::int64_t room = (classes + kPack<S> - 1) / kPack<S> * kPack<S>;
  std::vector<A> exponentials(scratch ? group * room : 0);
  std::vector<RowSums<A>> sums(group * count);
  RowGradient<A> gradients[kGroup];

  for (std::int64_t first = begin; first < end; first += group) {
    const std::int64_t size = std::min(group, end - first);
    const auto out = [&](std::int64_t i) { return batch.gradient ? batch.gradient + (first + i) * classes : nullptr; };
    const auto kept = [&](std::int64_t i) { return scratch ? exponentials.data() + i * room : room_in(out(i), classes); };
    // An ignored row is not even read, unless its statistics are asked for.
    const auto skipped = [&](std::int64_t i) { return !batch.fields && batch.target.ignored(first + i); };

    for (std::int64_t i = 0; i < size; ++i)
      for (std::int64_t b = 0; b < count && !skipped(i); ++b)
        sums[i * count + b] = read_block<S, WIDE>(batch.logits.row(first + i), block_span(b, classes), kept(i));
    for (std::int64_t i = 0; i < size; ++i) {
      if (skipped(i)) {
        batch.loss[first + i] = 0;
        gradients[i] = {{}, -1, -1};
      } else {
        gradients[i] = finish_row<S, WIDE>(batch, first + i, &sums[i * count]);
      }
    }
    if (!batch.gradient) continue;
    for (std::int64_t i = 0; i < size; ++i)
      for (std::int64_t b = 0; b < count; ++b) {
        const Span span = block_span(b, classes);
        write_gradient<S, WIDE>(
            gradients[i], batch.logits.row(first + i) + span.first, kept(i) ? kept(i) + span.first : nullptr,
            sums[i * count + b].max, out(i) + span.first, span);
      }
  }
}
template <class S> void rows(const ForwardBatch<S>& batch, std::int64_t begin, std::int64_t end) {
  is_wide(batch.objective) ? rows_of<S, true>(batch, begin, end) : rows_of<S, false>(batch, begin, end);
}

template <class S>
void block_sums(const ForwardBatch<S>& batch, RowSums<Arithmetic<S>>* blocks, std::int64_t begin, std::int64_t end) {
  const std::int64_t classes = batch.logits.classes, count = blocks_of(classes);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t row = i / count;
    Arithmetic<S>* kept = batch.gradient ? room_in(batch.gradient + row * classes, classes) : nullptr;
    const Span span = block_span(i % count, classes);
    blocks[i] = is_wide(batch.objective) ? read_block<S, true>(batch.logits.row(row), span, kept)
                                         : read_block<S, false>(batch.logits.row(row), span, kept);
  }
}

template <class S>
void finish_rows(
    const ForwardBatch<S>& batch, const RowSums<Arithmetic<S>>* blocks, RowGradient<Arithmetic<S>>* gradients) {
  for (std::int64_t row = 0; row < batch.logits.rows; ++row) {
    const RowSums<Arithmetic<S>>* own = blocks + row * blocks_of(batch.logits.classes);
    gradients[row] = is_wide(batch.objective) ? finish_row<S, true>(batch, row, own) : finish_row<S, false>(batch, row, own);
  }
}

template <class S>
void block_gradients(
    const ForwardBatch<S>& batch, const RowSums<Arithmetic<S>>* blocks, const RowGradient<Arithmetic<S>>* gradients,
    std::int64_t begin, std::int64_t end) {
  const std::int64_t classes = batch.logits.classes, count = blocks_of(classes);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t row = i / count;
    const Span span = block_span(i % count, classes);
    S* out = batch.gradient + row * classes + span.first;
    const S* z = batch.logits.row(row) + span.first;
    is_wide(batch.objective)
        ? write_gradient<S, true>(gradients[row], z, room_in(out, classes), blocks[i].max, out, span)
        : write_gradient<S, false>(gradients[row], z, room_in(out, classes), blocks[i].max, out, span);
  }
}

template <class S, bool WIDE>
void recompute_of(const BackwardBatch<S>& batch, std::int64_t begin, std::int64_t end) {
  using A = Arithmetic<S>;
  const std::int64_t rows = batch.logits.rows, classes = batch.logits.classes, count = blocks_of(classes);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t row = i / count;
    const auto field = [&](Field f) { return batch.fields[f * rows + row]; };
    // An ignored row has gradient 0 whatever the upstream one: not 0 * inf.
    const bool counted = !batch.target.ignored(row);
    const A up = counted ? batch.upstream[row * batch.upstream_stride] : A(0);
    const std::int64_t target = counted ? batch.target.at(row) : -1;
    const RowGradient<A> gradient{
        {field(kMax), up * field(kScale), up * field(kSlope), up * field(kTargetTerm),
         batch.prediction ? up * field(kArgmaxTerm) : A(0), WIDE ? up * field(kSquare) : A(0),
         WIDE ? up * field(kConstant) : A(0)},
        target, batch.prediction ? batch.prediction[row] : -1};
    const Span span = block_span(i % count, classes);
    write_gradient<S, WIDE>(gradient, batch.logits.row(row) + span.first, nullptr, gradient.affine.max,
                            batch.gradient + row * classes + span.first, span);
  }
}
template <class S> void recompute(const BackwardBatch<S>& batch, std::int64_t begin, std::int64_t end) {
  batch.wide ? recompute_of<S, true>(batch, begin, end) : recompute_of<S, false>(batch, begin, end);
}

#include "quantities.h"

template <class S> constexpr RowKernel<S> row_kernel() {
  return {rows<S>, block_sums<S>, finish_rows<S>, block_gradients<S>, recompute<S>, row_sums<S>, row_quantities<S>,
          gradients_of_slopes<S>};
}
// A template, so that who asks for one kernel alone compiles no other.
template <class...> constexpr RowKernels all_row_kernels() {
  return {row_kernel<float>(), row_kernel<double>(), row_kernel<BFloat16>(), row_kernel<Float16>()};
}
