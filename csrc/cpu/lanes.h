// Vectors of the width of one instruction set, through the compiler's own vector types (GCC, Clang).
// Included once an instruction set, inside its namespace, with DAL_VECTOR_BYTES set: no include guard.

#define DAL_LANE inline __attribute__((always_inline))

template <class A> struct LaneTypes;
template <> struct LaneTypes<float> { using Int = std::int32_t; using UInt = std::uint32_t; };
template <> struct LaneTypes<double> { using Int = std::int64_t; using UInt = std::uint64_t; };

template <class A> constexpr int kLanes = DAL_VECTOR_BYTES / sizeof(A);
template <class T, int BYTES> struct VectorOf { typedef T type __attribute__((vector_size(BYTES))); };
template <class A> using Vec = typename VectorOf<A, DAL_VECTOR_BYTES>::type;
template <class A> using IntVec = typename VectorOf<typename LaneTypes<A>::Int, DAL_VECTOR_BYTES>::type;
template <class A> using UIntVec = typename VectorOf<typename LaneTypes<A>::UInt, DAL_VECTOR_BYTES>::type;
using HalfVec = VectorOf<std::uint16_t, DAL_VECTOR_BYTES / 2>::type;

template <class To, class From> DAL_LANE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Minus 0, which changes nothing: plus 0 would be an addition, for the sake of -0.
template <class A> DAL_LANE Vec<A> splat(A x) { return x - Vec<A>{}; }

// `x` where it is above `y`, else `y`, as where one is NaN. Compilers make two operations of that where x86 has one.
template <class A> DAL_LANE Vec<A> greater_of(Vec<A> x, Vec<A> y) {
#if DAL_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return bits_as<Vec<A>>(_mm512_max_ps(bits_as<__m512>(x), bits_as<__m512>(y)));
  else return bits_as<Vec<A>>(_mm512_max_pd(bits_as<__m512d>(x), bits_as<__m512d>(y)));
#elif DAL_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) return bits_as<Vec<A>>(_mm256_max_ps(bits_as<__m256>(x), bits_as<__m256>(y)));
  else return bits_as<Vec<A>>(_mm256_max_pd(bits_as<__m256d>(x), bits_as<__m256d>(y)));
#else
  return x > y ? x : y;
#endif
}
// NaN stays NaN.
template <class A> DAL_LANE Vec<A> at_least(Vec<A> x, A low) { return greater_of<A>(splat(low), x); }
// NaN in `x` is passed over.
template <class A> DAL_LANE Vec<A> larger(Vec<A> best, Vec<A> x) { return greater_of<A>(x, best); }

// Fixed trees of halves: the same bits at every call.
struct Add {
  template <class V> DAL_LANE V operator()(V l, V r) const { return l + r; }
};
struct Larger {
  template <class V> DAL_LANE V operator()(V l, V r) const { return r > l ? r : l; }
};
struct Or {
  template <class V> DAL_LANE V operator()(V l, V r) const { return l | r; }
};
template <class Op, class A, class V> DAL_LANE A fold(const Op& op, V v) {
  if constexpr (sizeof(V) > 16) {
    typename VectorOf<A, sizeof(V) / 2>::type halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return fold<Op, A>(op, op(halves[0], halves[1]));
  } else if constexpr (sizeof(A) == 4) {
    return op(op(v[0], v[2]), op(v[1], v[3]));
  } else {
    return op(v[0], v[1]);
  }
}
template <class A> DAL_LANE A sum_of(Vec<A> v) { return fold<Add, A>(Add{}, v); }
template <class A> DAL_LANE A max_of(Vec<A> v) { return fold<Larger, A>(Larger{}, v); }

// ---- storage <-> arithmetic

// What one load brings: one vector; of bfloat16 two, its even and its odd positions: each is one operation from the
// words, where positions in order take two. Position i * kVectors + p of a pack is lane i of part p.
template <class S> constexpr int kVectors = std::is_same_v<S, BFloat16> ? 2 : 1;
template <class S> constexpr int kPack = kVectors<S> * kLanes<Arithmetic<S>>;
template <class S> struct Pack {
  Vec<Arithmetic<S>> part[kVectors<S>];
};
template <class S> DAL_LANE Pack<S> pack_of(Arithmetic<S> x) {
  Pack<S> pack;
  for (auto& part : pack.part) part = splat(x);
  return pack;
}

// Round to nearest even into the upper half, the lower is left over; NaN stays NaN (the carry must not run into infinity
// or the sign).
DAL_LANE UIntVec<float> rounded_to_bf16(Vec<float> v) {
  const UIntVec<float> bits = bits_as<UIntVec<float>>(v);
  return v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
}

#if DAL_HAS_F16C
DAL_LANE Vec<float> widen_f16(HalfVec v) {
#if DAL_VECTOR_BYTES == 64
  return bits_as<Vec<float>>(_mm512_cvtph_ps(bits_as<__m256i>(v)));
#else
  return bits_as<Vec<float>>(_mm256_cvtph_ps(bits_as<__m128i>(v)));
#endif
}
DAL_LANE HalfVec narrow_f16(Vec<float> v) {
#if DAL_VECTOR_BYTES == 64
  return bits_as<HalfVec>(_mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  return bits_as<HalfVec>(_mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
// Exponent and fraction move up 13 places and the bias grows by 112. Subnormals: 2^-14 is put in front of the
// fraction as an implicit one and taken off again.
DAL_LANE Vec<float> widen_f16(HalfVec v) {
  using F = Vec<float>;
  using U = UIntVec<float>;
  const U half = __builtin_convertvector(v, U);
  const U magnitude = (half & 0x7fffu) << 13;
  const U normal = magnitude + (112u << 23);
  const U special = magnitude + (224u << 23);
  const F subnormal = bits_as<F>(magnitude + (113u << 23)) - 6.103515625e-5f;
  U out = magnitude >= (31u << 23) ? special : normal;
  out = magnitude < (1u << 23) ? bits_as<U>(subnormal) : out;
  return bits_as<F>(out | ((half & 0x8000u) << 16));
}
// Round to nearest even. Subnormals: adding 0.5 leaves the fraction, rounded by the adder, in the low bits.
DAL_LANE HalfVec narrow_f16(Vec<float> v) {
  using F = Vec<float>;
  using U = UIntVec<float>;
  const U bits = bits_as<U>(v);
  const U magnitude = bits & 0x7fffffffu;
  const U subnormal = bits_as<U>(bits_as<F>(magnitude) + 0.5f) - bits_as<U>(splat(0.5f));
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U out = magnitude < (113u << 23) ? subnormal : normal;
  out = magnitude >= 0x477ff000u ? U{} + 0x7c00u : out;  // 65520 and above round to infinity
  out = v == v ? out : U{} + 0x7e00u;
  return __builtin_convertvector(out | ((bits >> 16) & 0x8000u), HalfVec);
}
#endif

template <class S> struct Stored {
  using Type = Vec<S>;
  static DAL_LANE Pack<S> widen(Type v) { return {{v}}; }
  static DAL_LANE Type narrow(const Pack<S>& pack) { return pack.part[0]; }
};
template <> struct Stored<Float16> {
  using Type = HalfVec;
  static DAL_LANE Pack<Float16> widen(Type v) { return {{widen_f16(v)}}; }
  static DAL_LANE Type narrow(const Pack<Float16>& pack) { return narrow_f16(pack.part[0]); }
};
template <> struct Stored<BFloat16> {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even position is the lower half of a word");
  using Type = UIntVec<float>;
  static DAL_LANE Pack<BFloat16> widen(Type v) {
    return {{bits_as<Vec<float>>(v << 16), bits_as<Vec<float>>(v & 0xffff0000u)}};
  }
  static DAL_LANE Type narrow(const Pack<BFloat16>& pack) {
#ifdef DAL_HAS_BF16
    // The instruction takes what is below 2^-126 for 0. It leaves the even positions first.
    const VectorOf<std::uint16_t, 64>::type order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto halves = _mm512_cvtne2ps_pbh(bits_as<__m512>(pack.part[1]), bits_as<__m512>(pack.part[0]));
    return bits_as<Type>(_mm512_permutexvar_epi16(bits_as<__m512i>(order), bits_as<__m512i>(halves)));
#else
    return rounded_to_bf16(pack.part[0]) >> 16 | (rounded_to_bf16(pack.part[1]) & 0xffff0000u);
#endif
  }
};

template <class S> DAL_LANE Pack<S> load(const S* from) {
  typename Stored<S>::Type v;
  std::memcpy(&v, from, sizeof(v));
  return Stored<S>::widen(v);
}
template <class S> DAL_LANE void store(S* to, const Pack<S>& pack) {
  const typename Stored<S>::Type v = Stored<S>::narrow(pack);
  std::memcpy(to, &v, sizeof(v));
}

// ---- one value, and the ragged end of a row (n < kPack)

template <class S> DAL_LANE Arithmetic<S> load_one(const S* from) {
  if constexpr (std::is_same_v<S, Arithmetic<S>>) return *from;
  else return Stored<S>::widen(typename Stored<S>::Type{} + from->bits).part[0][0];
}
template <class S> DAL_LANE void store_one(S* to, Arithmetic<S> value) {
  if constexpr (std::is_same_v<S, Arithmetic<S>>) *to = value;
  else to->bits = static_cast<std::uint16_t>(Stored<S>::narrow(pack_of<S>(value))[0]);
}

#if DAL_VECTOR_BYTES == 64
DAL_LANE Vec<float> load_masked(const float* from, int n, Vec<float> rest) {
  return bits_as<Vec<float>>(_mm512_mask_loadu_ps(bits_as<__m512>(rest), __mmask16((1u << n) - 1), from));
}
DAL_LANE Vec<double> load_masked(const double* from, int n, Vec<double> rest) {
  return bits_as<Vec<double>>(_mm512_mask_loadu_pd(bits_as<__m512d>(rest), __mmask8((1u << n) - 1), from));
}
DAL_LANE HalfVec load_masked(const Float16* from, int n, HalfVec rest) {
  return bits_as<HalfVec>(_mm256_mask_loadu_epi16(bits_as<__m256i>(rest), __mmask16((1u << n) - 1), from));
}
DAL_LANE UIntVec<float> load_masked(const BFloat16* from, int n, UIntVec<float> rest) {
  return bits_as<UIntVec<float>>(_mm512_mask_loadu_epi16(bits_as<__m512i>(rest), __mmask32((1u << n) - 1), from));
}
DAL_LANE void store_masked(float* to, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(to, __mmask16((1u << n) - 1), bits_as<__m512>(v));
}
DAL_LANE void store_masked(double* to, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(to, __mmask8((1u << n) - 1), bits_as<__m512d>(v));
}
DAL_LANE void store_masked(Float16* to, HalfVec v, int n) {
  _mm256_mask_storeu_epi16(to, __mmask16((1u << n) - 1), bits_as<__m256i>(v));
}
DAL_LANE void store_masked(BFloat16* to, UIntVec<float> v, int n) {
  _mm512_mask_storeu_epi16(to, __mmask32((1u << n) - 1), bits_as<__m512i>(v));
}
template <class S> DAL_LANE Pack<S> load_few(const S* from, int n, Arithmetic<S> rest) {
  return Stored<S>::widen(load_masked(from, n, Stored<S>::narrow(pack_of<S>(rest))));
}
template <class S> DAL_LANE void store_few(S* to, const Pack<S>& pack, int n) {
  store_masked(to, Stored<S>::narrow(pack), n);
}
#else
// Copies of constant size: a memcpy of n bytes is a call.
template <class S> DAL_LANE void copy_few(S* to, const S* from, int n) {
  int done = 0;
  for (int piece = kPack<S> / 2; piece > 0; piece /= 2)
    if (n & piece) {
      std::memcpy(to + done, from + done, piece * sizeof(S));
      done += piece;
    }
}
template <class S> DAL_LANE Pack<S> load_few(const S* from, int n, Arithmetic<S> rest) {
  S padded[kPack<S>];
  store(padded, pack_of<S>(rest));
  copy_few(padded, from, n);
  return load(padded);
}
template <class S> DAL_LANE void store_few(S* to, const Pack<S>& pack, int n) {
  S padded[kPack<S>];
  store(padded, pack);
  copy_few(to, padded, n);
}
#endif

// e^x for x <= 0: 2^n 2^f with n the nearest integer to x log2(e) and |f| <= 1/2.
// Adding the magic number leaves n + bias in the low bits, which a shift makes the exponent of 2^n. Below `low`
// that exponent is 0 and the product is exactly 0. NaN passes through the multiplications.
template <class A> struct Exp;
template <> struct Exp<float> {
  static constexpr float low = -88.0f, log2e = 1.44269504088896340736f, magic = 12582912.0f + 127.0f;
  static constexpr int fraction_bits = 23;
  // Minimax in relative error (9e-8), constant term 1.
  static constexpr float c[] = {0.6931470036506653f, 0.24022242426872253f, 0.05550733581185341f,
                                0.009671512991189957f, 0.001326472731307149f};
};
template <> struct Exp<double> {
  static constexpr double low = -709.0, log2e = 1.44269504088896340736, magic = 6755399441055744.0 + 1023.0;
  static constexpr int fraction_bits = 52;
  // Taylor: ln(2)^k / k!, remainder 2e-16 at |f| = 1/2.
  static constexpr double c[] = {0.69314718055994530942,    0.24022650695910071233,    0.055504108664821579953,
                                 0.0096181291076284771620,  0.0013333558146428443423,  1.5403530393381609954e-4,
                                 1.5252733804059840280e-5,  1.3215486790144309488e-6,  1.0178086009239699727e-7,
                                 7.0549116208011233299e-9,  4.4455382718708114976e-10, 2.5678435993488205142e-11};
};
// 2^n 2^f with n + bias in the low bits of `shifted`.
template <class A> DAL_LANE Vec<A> power_of_2(Vec<A> shifted, Vec<A> f) {
  using E = Exp<A>;
  constexpr int degree = sizeof(E::c) / sizeof(E::c[0]);
  Vec<A> poly = splat(E::c[degree - 1]);
#pragma GCC unroll 16
  for (int k = degree - 2; k >= 0; --k) poly = poly * f + E::c[k];
  poly = poly * f + A(1);
  return poly * bits_as<Vec<A>>(bits_as<UIntVec<A>>(shifted) << E::fraction_bits);
}
// x must be at least Exp<A>::low. The rounded log2(e) costs |x| / 2 ulp more, of a small part of a sum.
template <class A> DAL_LANE Vec<A> exp_of(Vec<A> x) {
  using E = Exp<A>;
  const Vec<A> shifted = x * E::log2e + E::magic;
  return power_of_2<A>(shifted, x * E::log2e - (shifted - E::magic));
}
// The same with its digits at every x: ln 2 in two parts, because n times the first is exact.
DAL_LANE Vec<float> precise_exp_of(Vec<float> x) {
  using E = Exp<float>;
  const Vec<float> shifted = x * E::log2e + E::magic, n = shifted - E::magic;
  return power_of_2<float>(shifted, (x - n * 0.69313812256f - n * 9.0580006145e-6f) * E::log2e);
}

// ln x of what is not negative, to about 1 ulp, and 0 at 1: x = 2^k (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and
// with s = f / (2 + f)  ln(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)), R being fdlibm's. Below 2^-126 the bits of x do not
// hold its exponent, those of 2^23 x do.
DAL_LANE Vec<float> log_of(Vec<float> x) {
  constexpr std::uint32_t root_half = 0x3f3504f3, one = 0x3f800000;
  const IntVec<float> subnormal = x < std::numeric_limits<float>::min();
  const Vec<float> normal = subnormal ? x * 8388608.0f : x;
  const UIntVec<float> bits = bits_as<UIntVec<float>>(normal) + (one - root_half);
  const IntVec<float> exponent = bits_as<IntVec<float>>(bits >> 23) - 127 + (subnormal & -23);
  const Vec<float> k = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> f = bits_as<Vec<float>>((bits & 0x007fffffu) + root_half) - 1.0f;
  const Vec<float> s = f / (2.0f + f), z = s * s, half = 0.5f * f * f;
  const Vec<float> rest = z * (0.66666662693f + z * (0.40000972152f + z * (0.28498786688f + z * 0.24279078841f)));
  const Vec<float> found = k * 0.69313812256f + (f - (half - (s * (half + rest) + k * 9.0580006145e-6f)));
  const Vec<float> special = x == 0.0f ? splat(-std::numeric_limits<float>::infinity()) : x;
  return (x > 0.0f) & (x < std::numeric_limits<float>::infinity()) ? found : special;
}
