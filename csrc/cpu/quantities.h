// Rows whose loss is made elsewhere: their sums, the quantities that losses are made of, and the gradient from the slopes
// that come back. Included by row.h, once an instruction set: no include guard.

// Sums of a whole row, and of its blocks.
template <class S>
DAL_LANE RowSums<Arithmetic<S>> read_row(const S* z, std::int64_t classes, bool wide, RowSums<Arithmetic<S>>* blocks) {
  const std::int64_t count = blocks_of(classes);
  for (std::int64_t b = 0; b < count; ++b) {
    const Span span = block_span(b, classes);
    blocks[b] = wide ? read_block<S, true>(z, span, nullptr) : read_block<S, false>(z, span, nullptr);
  }
  return merged(blocks, count);
}

template <class S> void row_sums(const SumsBatch<S>& batch, std::int64_t begin, std::int64_t end) {
  using A = Arithmetic<S>;
  const std::int64_t classes = batch.logits.classes, rows = batch.logits.rows;
  std::vector<RowSums<A>> blocks(blocks_of(classes));
  for (std::int64_t row = begin; row < end; ++row) {
    const S* z = batch.logits.row(row);
    const RowSums<A> sums = read_row(z, classes, batch.wide, blocks.data());
    const bool poisoned = sums.sum != sums.sum;
    const std::int64_t largest = batch.argmax || poisoned ? argmax(z, classes, blocks.data(), sums) : 0;
    if (batch.argmax) batch.argmax[row] = largest;
    // m of a row with a NaN is that. Of a row of -inf alone m is that, and nothing counts.
    const bool empty = sums.max == -std::numeric_limits<A>::infinity() && !poisoned;
    const A values[5] = {poisoned ? load_one(z + largest) : sums.max, empty ? A(0) : sums.sum,
                         empty ? A(0) : sums.weighted, sums.differences, empty ? A(0) : sums.squares};
    for (int f = 0; f < (batch.wide ? 5 : 3); ++f) batch.sums[f * rows + row] = values[f];
  }
}

// Quantities and coefficients are made in double, because a loss of one's own may take differences of them.
template <class S> void row_quantities(const QuantitiesBatch<S>& batch, std::int64_t begin, std::int64_t end) {
  using A = Arithmetic<S>;
  const std::int64_t classes = batch.logits.classes, rows = batch.logits.rows;
  std::vector<RowSums<A>> blocks(blocks_of(classes));
  for (std::int64_t row = begin; row < end; ++row) {
    const S* z = batch.logits.row(row);
    const RowSums<A> sums = read_row(z, classes, true, blocks.data());
    batch.argmax[row] = argmax(z, classes, blocks.data(), sums);
    batch.sums[row] = sums;
    const RowSums<double> exact = in_double(sums);
    for (std::int64_t t = 0; t < batch.targets.count; ++t) {
      const std::int64_t target = batch.targets.ignored(row) ? 0 : batch.targets.at(row, t);
      const RowSummary<double> summary = summarise<double>(exact, load_one(z + target), static_cast<double>(classes));
      batch.log_prob[t * rows + row] = static_cast<A>(summary.target_log_prob);
      if (t > 0) continue;
      batch.entropy[row] = static_cast<A>(summary.entropy);
      batch.max_log_prob[row] = static_cast<A>(summary.max_log_prob);
      batch.sum_log_prob[row] = static_cast<A>(summary.sum_log_prob);
      batch.square_sum[row] = static_cast<A>(summary.square_sum);
    }
  }
}

template <class S, bool WIDE>
void gradients_of_slopes_of(const SlopesBatch<S>& batch, std::int64_t begin, std::int64_t end) {
  using A = Arithmetic<S>;
  const std::int64_t classes = batch.logits.classes, count = blocks_of(classes);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t row = i / count;
    double total = 0;
    for (std::int64_t t = 0; t < batch.targets.count; ++t) total += batch.by_log_prob.at(row, t);
    const Slopes<double> slopes{0, total, batch.by_entropy.at(row), batch.by_max_log_prob.at(row),
                                batch.by_sum_log_prob.at(row), batch.by_square_sum.at(row)};
    const RowSums<double> sums = in_double(batch.sums[row]);
    const AffineGradient<double> g = affine_gradient<WIDE>(
        sums, summarise<double>(sums, 0, static_cast<double>(classes)), slopes, 1.0);
    const RowGradient<A> gradient{
        {static_cast<A>(g.max), static_cast<A>(g.A), static_cast<A>(g.B), -batch.by_log_prob.at(row),
         static_cast<A>(g.u), static_cast<A>(g.E), static_cast<A>(g.D)},
        batch.targets.ignored(row) ? -1 : batch.targets.at(row, 0), batch.argmax[row]};
    const Span span = block_span(i % count, classes);
    S* out = batch.gradient + row * classes + span.first;
    write_gradient<S, WIDE>(
        gradient, batch.logits.row(row) + span.first, nullptr, gradient.affine.max, out, span);
    // Of further targets write_gradient knows nothing.
    for (std::int64_t t = 1; t < batch.targets.count && gradient.target >= 0; ++t) {
      const std::int64_t at = batch.targets.at(row, t) - span.first;
      if (at >= 0 && at < span.size) store_one(out + at, load_one(out + at) + batch.by_log_prob.at(row, t));
    }
  }
}
template <class S> void gradients_of_slopes(const SlopesBatch<S>& batch, std::int64_t begin, std::int64_t end) {
  batch.by_sum_log_prob || batch.by_square_sum ? gradients_of_slopes_of<S, true>(batch, begin, end)
                                               : gradients_of_slopes_of<S, false>(batch, begin, end);
}
