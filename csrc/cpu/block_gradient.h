// The gradient of a block of a row is written.
// Included by row.h, once an instruction set: no include guard.

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
    const bool inside[2] = {span.has(row.target), row.affine.u != A(0) && span.has(row.argmax)};
    const std::int64_t special[2] = {inside[0] ? row.target - span.first : -1, inside[1] ? row.argmax - span.first : -1};
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
