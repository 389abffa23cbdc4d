// Slopes of a loss by the quantities of its row -> coefficients of the gradient by the logits: the one chain rule of all
// losses. Host and device code.
// Included by formulas.h, and once more for vectors of rows: no include guard.

// A loss of a row, and its derivatives by what it depends on.
template <class A>
struct Slopes {
  A loss = 0, by_log_prob = 0, by_entropy = 0, by_max_log_prob = 0, by_sum_log_prob = 0, by_square_sum = 0;
};
template <class A>
DAL_HD Slopes<A> operator+(const Slopes<A>& l, const Slopes<A>& r) {
  return {l.loss + r.loss,
          l.by_log_prob + r.by_log_prob,
          l.by_entropy + r.by_entropy,
          l.by_max_log_prob + r.by_max_log_prob,
          l.by_sum_log_prob + r.by_sum_log_prob,
          l.by_square_sum + r.by_square_sum};
}

// Every loss here has the gradient
//   dL/dz_j = p_j (a + b (ln p_j + H) + c p_j) + d - t [j = y] - u [j = argmax z]
//   a = -(L_l + L_M + C L_G + 2 Q L_Q),  b = -L_H,  c = 2 L_Q,  d = L_G,  t = -L_l,  u = -L_M
// H stands beside ln p_j because the two cancel: ln p_j + H = (z_j - m) - W / S, without a rounded ln S in between.
// In what a kernel has at hand, e_j = e^(z_j - m):
//   dL/dz_j = e_j (A + B (z_j - m) + E e_j) + D - t [j = y] - u [j = argmax z]
//   A = (a - b W / S) / S,  B = b / S,  E = c / S^2,  D = d
template <class T>
struct AffineGradient {
  T max = 0, A = 0, B = 0, t = 0, u = 0, E = 0, D = 0;
};

// WIDE: of a loss that may have E and D. The others are spared what is 0.
template <bool WIDE, class T>
DAL_HD AffineGradient<T> affine_gradient(
    const RowSums<T>& sums, const RowSummary<T>& row, const Slopes<T>& slopes, T scale) {
  T a = -(slopes.by_log_prob + slopes.by_max_log_prob);
  const T b = -slopes.by_entropy;
  AffineGradient<T> gradient{};
  if (WIDE) {
    a -= row.classes * slopes.by_sum_log_prob;
    a -= select(slopes.by_square_sum != T(0), 2 * row.square_sum * slopes.by_square_sum, T(0));
    gradient.E = scale * 2 * slopes.by_square_sum / (sums.sum * sums.sum);
    gradient.D = scale * slopes.by_sum_log_prob;
  }
  gradient.max = sums.max;
  gradient.A = scale * (a - b * (sums.weighted / sums.sum)) / sums.sum;
  gradient.B = scale * b / sums.sum;
  gradient.t = -scale * slopes.by_log_prob;
  gradient.u = -scale * slopes.by_max_log_prob;
  return gradient;
}
