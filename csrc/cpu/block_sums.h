// A block of a row is read: its sums, its exponentials, and where its largest logit is.
// Included by row.h, once an instruction set: no include guard.

// Blocks of one row, or the part of a batch of rows, that begin at class `first`.
struct Span {
  std::int64_t first, size;
  DAL_LANE bool has(std::int64_t position) const { return position >= first && position < first + size; }
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

template <class S, bool WIDE>
DAL_LANE RowSums<Arithmetic<S>> read_block(const S* z, Span span, Arithmetic<S>* kept) {
  return kept ? block_sums_of<S, true, WIDE>(z + span.first, span.size, kept + span.first)
              : block_sums_of<S, false, WIDE>(z + span.first, span.size, nullptr);
}

template <class A> DAL_LANE RowSums<A> merged(const RowSums<A>* blocks, std::int64_t count) {
  RowSums<A> sums = blocks[0];
  for (std::int64_t b = 1; b < count; ++b) sums = merge(sums, blocks[b]);
  return sums;
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
