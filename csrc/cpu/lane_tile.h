// Rows side by side: lane i of a vector is row i, and each class has vectors of its own. How rows come there from where
// they lie, and how a gradient goes back. Included by lane_rows.h, once an instruction set: no include guard.

// kRows neighbours in memory, in order, as numbers.
template <class S> DAL_LANE Vec<float> load_lanes(const S* from) {
  if constexpr (std::is_same_v<S, float>) return load(from).part[0];
  HalfVec v;
  std::memcpy(&v, from, sizeof(v));
  if constexpr (std::is_same_v<S, Float16>) return widen_f16(v);
  else return bits_as<Vec<float>>(__builtin_convertvector(v, UIntVec<float>) << 16);
}
template <class S> DAL_LANE void store_lanes(S* to, Vec<float> v) {
  if constexpr (std::is_same_v<S, float>) return store(to, Pack<float>{{v}});
  HalfVec narrow;
  if constexpr (std::is_same_v<S, Float16>) narrow = narrow_f16(v);
#ifdef DAL_HAS_BF16
  else narrow = bits_as<HalfVec>(_mm512_cvtneps_pbh(bits_as<__m512>(v)));
#else
  else narrow = __builtin_convertvector(rounded_to_bf16(v) >> 16, HalfVec);
#endif
  std::memcpy(to, &narrow, sizeof(narrow));
}
// n < kRows of them. Copied one by one: few are.
template <class S> DAL_LANE Vec<float> load_few_lanes(const S* from, std::int64_t n) {
  S padded[kRows] = {};
  for (std::int64_t i = 0; i < n; ++i) padded[i] = from[i];
  return load_lanes(padded);
}
template <class S> DAL_LANE void store_few_lanes(S* to, Vec<float> v, std::int64_t n) {
  S padded[kRows];
  store_lanes(padded, v);
  for (std::int64_t i = 0; i < n; ++i) to[i] = padded[i];
}

// a0 b0 a1 b1 ..., of the lower halves or of the upper ones.
template <int FIRST, int... I>
DAL_LANE Vec<float> interleaved(Vec<float> a, Vec<float> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * kRows)...);
#else
  return __builtin_shuffle(a, b, IntVec<float>{(FIRST + I / 2 + I % 2 * kRows)...});
#endif
}
// Element j of vector i becomes element i of vector j: each round interleaves the first half of vectors with the second.
DAL_LANE void transpose(Vec<float> (&v)[kRows]) {
  using Places = std::make_integer_sequence<int, kRows>;
#pragma GCC unroll 4
  for (int round = 1; round < kRows; round *= 2) {
    Vec<float> next[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows / 2; ++i) {
      next[2 * i] = interleaved<0>(v[i], v[i + kRows / 2], Places{});
      next[2 * i + 1] = interleaved<kRows / 2>(v[i], v[i + kRows / 2], Places{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) v[i] = next[i];
  }
}

// At most so many numbers in a tile, which is read, evaluated and written while it is in cache.
constexpr std::int64_t kTile = 16384, kMostRows = 64;

// Rows [first, first + size) of a batch, with places for `room` of them in every class: their logits, and what becomes
// their gradient.
class Tile {
 public:
  const std::int64_t classes, room;
  std::int64_t first = 0, size = 0;

  explicit Tile(std::int64_t classes)
      : classes(classes), room(std::max<std::int64_t>(kRows, std::min(kMostRows, kTile / classes / kRows * kRows))),
        memory_(2 * classes * room + kRows) {
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(memory_.data());
    logits_ = reinterpret_cast<float*>((begin + DAL_VECTOR_BYTES - 1) / DAL_VECTOR_BYTES * DAL_VECTOR_BYTES);
  }
  Tile(const Tile&) = delete;

  DAL_LANE float* logits(std::int64_t lane) const { return logits_ + lane; }
  DAL_LANE float* gradient(std::int64_t lane) const { return logits_ + classes * room + lane; }

  template <class S> DAL_LANE void load(const S* data, const Layout& layout, std::int64_t rows) {
    if (layout.class_stride == 1) load_rows(data, layout, data + layout.at(rows - 1) + classes);
    else load_columns(data, layout);
  }
  // Rows of the gradient lie one after the other where their classes are neighbours.
  template <class S> DAL_LANE void store(S* data, const Layout& layout) const {
    if (layout.class_stride == 1) store_rows(data + first * classes);
    else store_columns(data, layout);
  }

 private:
  // f(lane, count, offset) of rows that are neighbours in memory.
  template <class F> DAL_LANE void for_runs(const Layout& layout, const F& f) const {
    const std::int64_t longest = layout.inner_stride == 1 ? size : 1;
    for (std::int64_t lane = 0, count; lane < size; lane += count) {
      count = std::min({longest, size - lane, layout.inner - (first + lane) % layout.inner});
      f(lane, count, layout.at(first + lane));
    }
  }
  template <class S> DAL_LANE void load_columns(const S* data, const Layout& layout) {
    for_runs(layout, [&](std::int64_t lane, std::int64_t count, std::int64_t offset) {
      for (std::int64_t cls = 0; cls < classes; ++cls) {
        const S* from = data + offset + cls * layout.class_stride;
        float* to = logits(lane) + cls * room;
        std::int64_t i = 0;
        for (; i + kRows <= count; i += kRows) {
          // What the next tile reads: too far apart for the machine to see it coming.
          __builtin_prefetch(from + i + room, 0, 2);
          store_lanes(to + i, load_lanes(from + i));
        }
        for (; i < count; ++i) to[i] = load_one(from + i);
      }
    });
  }
  template <class S> DAL_LANE void store_columns(S* data, const Layout& layout) const {
    for_runs(layout, [&](std::int64_t lane, std::int64_t count, std::int64_t offset) {
      for (std::int64_t cls = 0; cls < classes; ++cls) {
        S* to = data + offset + cls * layout.class_stride;
        const float* from = gradient(lane) + cls * room;
        std::int64_t i = 0;
        for (; i + kRows <= count; i += kRows) {
          __builtin_prefetch(to + i + room, 1, 2);
          store_lanes(to + i, load_lanes(from + i));
        }
        for (; i < count; ++i) store_one(to + i, from[i]);
      }
    });
  }

  // A square of as many rows as classes is transposed in registers. What is read past the end of a row is another
  // one's, up to `end`, where the last row ends, and goes no further.
  template <class S> DAL_LANE void load_rows(const S* data, const Layout& layout, const S* end) {
    for (std::int64_t lane = 0; lane < size; lane += kRows) {
      const S* row[kRows];
      for (std::int64_t i = 0; i < kRows; ++i) row[i] = data + layout.at(first + std::min(lane + i, size - 1));
      for (std::int64_t cls = 0; cls < classes; cls += kRows) {
        Vec<float> v[kRows];
        for (int i = 0; i < kRows; ++i) {
          const S* from = row[i] + cls;
          v[i] = end - from >= kRows ? load_lanes(from) : load_few_lanes(from, end - from);
        }
        transpose(v);
        const std::int64_t count = std::min<std::int64_t>(kRows, classes - cls);
        for (std::int64_t j = 0; j < count; ++j) store_lanes(logits(lane) + (cls + j) * room, v[j]);
      }
    }
  }
  // Whole vectors: what they write past the end of a row is written again after them, because rows go in order, and of
  // a row the last classes first.
  template <class S> DAL_LANE void store_rows(S* data) const {
    for (std::int64_t lane = 0; lane < size; lane += kRows) {
      const std::int64_t rows = std::min<std::int64_t>(kRows, size - lane);
      S* begin = data + lane * classes;
      S* end = begin + rows * classes;
      for (std::int64_t cls = (classes - 1) / kRows * kRows; cls >= 0; cls -= kRows) {
        const std::int64_t count = std::min<std::int64_t>(kRows, classes - cls);
        Vec<float> v[kRows];
        for (int j = 0; j < kRows; ++j) v[j] = load_lanes(gradient(lane) + (cls + std::min<std::int64_t>(j, count - 1)) * room);
        transpose(v);
        for (std::int64_t i = 0; i < rows; ++i) {
          S* to = begin + i * classes + cls;
          end - to >= kRows ? store_lanes(to, v[i]) : store_few_lanes(to, v[i], count);
        }
      }
    }
  }

  std::vector<float> memory_;
  float* logits_;
};
