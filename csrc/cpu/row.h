// The CPU row kernel: sums, objective, affine gradient, on a row that stays in cache.
// Included once an instruction set, inside its namespace, after lanes.h: no include guard.

#include "block_sums.h"
#include "block_gradient.h"

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
    const A values[kFields] = {
        g.max, g.A, g.B, g.t, g.u, std::exp(summary.target_log_prob), summary.entropy,
        // Of a row of -inf alone nothing is known, as of its entropy.
        sums.sum > 0 ? std::exp(summary.max_log_prob) : std::numeric_limits<A>::quiet_NaN(), g.E, g.D};
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

#include "lane_rows.h"
#include "quantities.h"

// Measured: of more classes, the vectors of a row are full enough.
constexpr std::int64_t kLaneClasses = DAL_VECTOR_BYTES >= 32 ? 160 : 64;

template <class S> constexpr RowKernel<S> row_kernel() {
  RowKernel<S> kernel{rows<S>, block_sums<S>, finish_rows<S>, block_gradients<S>, recompute<S>, nullptr, nullptr, 0,
                      row_sums<S>, row_quantities<S>, gradients_of_slopes<S>};
  if constexpr (std::is_same_v<Arithmetic<S>, float>) {
    kernel.lane_rows = lane_rows<S>;
    kernel.recompute_lanes = recompute_lanes<S>;
    kernel.lane_classes = kLaneClasses;
  }
  return kernel;
}
// A template, so that who asks for one kernel alone compiles no other.
template <class...> constexpr RowKernels all_row_kernels() {
  return {row_kernel<float>(), row_kernel<double>(), row_kernel<BFloat16>(), row_kernel<Float16>()};
}
