// Rows side by side: lane i of a vector is row i, and each class has vectors of its own. How rows come there from where
// they lie, and how a gradient goes back. Included by lane_rows.h, once an instruction set: no include guard.

constexpr int kSide = kLanes<float>;  // rows, and classes, of a square that is transposed at once

// A vector of neighbours in memory, in order, as numbers.
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
// n < kSide of them. Copied one by one: few are.
template <class S> DAL_LANE Vec<float> load_few_lanes(const S* from, std::int64_t n) {
  S padded[kSide] = {};
  for (std::int64_t i = 0; i < n; ++i) padded[i] = from[i];
  return load_lanes(padded);
}
template <class S> DAL_LANE void store_few_lanes(S* to, Vec<float> v, std::int64_t n) {
  S padded[kSide];
  store_lanes(padded, v);
  for (std::int64_t i = 0; i < n; ++i) to[i] = padded[i];
}

template <class S> DAL_LANE RowVector load_rows(const S* from) { return {load_lanes(from), load_lanes(from + kSide)}; }
template <class S> DAL_LANE void store_rows(S* to, RowVector v) {
  store_lanes(to, v.low);
  store_lanes(to + kSide, v.high);
}

// Blocks of B lanes of `a` and of `b` in turns, from the lower halves of groups of lanes or from the upper ones. Groups of
// at least four, because x86 moves numbers within 16 bytes by one operation, and across them by more.
template <int B, int UPPER, int I> constexpr int lane_in_turns() {
  constexpr int group = B < 2 ? 4 : 2 * B, place = I % group;
  return I - place + UPPER * group / 2 + place / (2 * B) * B + place % B + place / B % 2 * kSide;
}
template <int B, int UPPER, int... I>
DAL_LANE Vec<float> in_turns(Vec<float> a, Vec<float> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane_in_turns<B, UPPER, I>()...);
#else
  return __builtin_shuffle(a, b, IntVec<float>{lane_in_turns<B, UPPER, I>()...});
#endif
}
template <int B> DAL_LANE void transpose_blocks(Vec<float> (&v)[kSide]) {
  using Lanes = std::make_integer_sequence<int, kSide>;
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i)
    if ((i & B) == 0) {
      const Vec<float> lower = in_turns<B, 0>(v[i], v[i + B], Lanes{});
      v[i + B] = in_turns<B, 1>(v[i], v[i + B], Lanes{});
      v[i] = lower;
    }
}
// Element j of vector i becomes element i of vector j.
DAL_LANE void transpose(Vec<float> (&v)[kSide]) {
  transpose_blocks<1>(v);
  transpose_blocks<2>(v);
  if constexpr (kSide > 4) transpose_blocks<4>(v);
  if constexpr (kSide > 8) transpose_blocks<8>(v);
  // Of four vectors the middle two have come to each other's place.
#pragma GCC unroll 4
  for (int i = 0; i < kSide; i += 4) {
    const Vec<float> second = v[i + 1];
    v[i + 1] = v[i + 2];
    v[i + 2] = second;
  }
}

// At most so many numbers in a tile, which is read, evaluated and written while it is in cache. Of rows whose classes are
// neighbours so many rows as a first cache holds. Of classes apart many more, so that each class is read over a page of
// memory: the machine foresees none of many shorter runs, which also meet on the same few places of its caches.
constexpr std::int64_t kTile = 32768, kMostRows = 64, kMostRowsApart = 1024;
// How far ahead of what is read or written memory is asked for, in numbers of 8 KiB.
template <class S> constexpr std::int64_t kAhead = 8192 / sizeof(S);

// Rows [first, first + size) of those from `begin` up to `end`, one tile after the other, with places for `room` of them:
// their logits, and what becomes their gradient.
// Between its classes lies `stride`, not a large power of 2, because they would meet in a cache.
class Tile {
 public:
  const std::int64_t end, classes, room, stride;
  std::int64_t first, size;

  Tile(std::int64_t begin, std::int64_t end, std::int64_t classes, const Layout& layout)
      : end(end),
        classes(classes),
        room(whole_vectors(std::min({end - begin, layout.class_stride == 1 ? kMostRows : kMostRowsApart, kTile / classes}))),
        stride(room < 64 ? room : room + 16), first(begin - room), memory_(2 * classes * stride + kSide) {
    advance();
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(memory_.data());
    logits_ = reinterpret_cast<float*>((address + DAL_VECTOR_BYTES - 1) / DAL_VECTOR_BYTES * DAL_VECTOR_BYTES);
  }
  Tile(const Tile&) = delete;

  // To the next rows; to none behind the last.
  DAL_LANE void advance() {
    first += room;
    size = std::min(room, end - first);
  }
  DAL_LANE float* logits(std::int64_t lane) const { return logits_ + lane; }
  DAL_LANE float* gradient(std::int64_t lane) const { return logits_ + classes * stride + lane; }

  static std::int64_t whole_vectors(std::int64_t rows) { return std::max<std::int64_t>(1, (rows + kRows - 1) / kRows) * kRows; }

  // `rows`: of how many memory may be read, the tile's among them, of which the last lies last.
  template <class S> DAL_LANE void load(const S* data, const Layout& layout, std::int64_t rows) {
    if (layout.class_stride == 1) load_squares(data, layout, data + layout.at(rows - 1) + classes);
    else load_columns(data, layout);
  }
  // Rows of the gradient lie one after the other where their classes are neighbours. `own`: the rows before this one are
  // the caller's to write, those behind the tile too.
  template <class S> DAL_LANE void store(S* data, const Layout& layout, std::int64_t own) const {
    if (layout.class_stride == 1) store_squares(data + first * classes, data + own * classes);
    else store_columns(data, layout);
  }

 private:
  // Once a line of a cache. Measured: squares of more classes than one jump too far for the machine to see what comes, and
  // took three times as long from memory; those of fewer do not.
  template <class S> DAL_LANE bool fetches_ahead(std::int64_t cls) const {
    return classes > 16 && cls * sizeof(S) % 64 == 0;
  }
  // What the next tile reads, or writes: too far apart for the machine to see it coming.
  template <int WRITE, class S> DAL_LANE void fetch_next(S* at) const {
    __builtin_prefetch(at + room, WRITE, 2);
    if constexpr (kRows * sizeof(S) > 64) __builtin_prefetch(at + room + kSide, WRITE, 2);
  }
  // f(lane, count, offset) of rows that are neighbours in memory.
  template <class F> DAL_LANE void for_runs(const Layout& layout, const F& f) const {
    const std::int64_t longest = layout.inner_stride == 1 ? size : 1;
    for (std::int64_t lane = 0, count; lane < size; lane += count) {
      count = std::min({longest, size - lane, layout.inner - (first + lane) % layout.inner});
      f(lane, count, layout.at(first + lane));
    }
  }
  template <class S> void load_columns(const S* data, const Layout& layout) {
    for_runs(layout, [&](std::int64_t lane, std::int64_t count, std::int64_t offset) {
      for (std::int64_t cls = 0; cls < classes; ++cls) {
        const S* from = data + offset + cls * layout.class_stride;
        float* to = logits(lane) + cls * stride;
        std::int64_t i = 0;
        for (; i + kRows <= count; i += kRows) {
          fetch_next<0>(from + i);
          store_rows(to + i, load_rows(from + i));
        }
        for (; i < count; ++i) to[i] = load_one(from + i);
      }
    });
  }
  template <class S> void store_columns(S* data, const Layout& layout) const {
    for_runs(layout, [&](std::int64_t lane, std::int64_t count, std::int64_t offset) {
      for (std::int64_t cls = 0; cls < classes; ++cls) {
        S* to = data + offset + cls * layout.class_stride;
        const float* from = gradient(lane) + cls * stride;
        std::int64_t i = 0;
        for (; i + kRows <= count; i += kRows) {
          fetch_next<1>(to + i);
          store_rows(to + i, load_rows(from + i));
        }
        for (; i < count; ++i) store_one(to + i, from[i]);
      }
    });
  }

  // A square of as many rows as classes is transposed in registers. What is read past the end of a row is another
  // one's, up to `end`, where the last row ends, and goes no further.
  template <class S> void load_squares(const S* data, const Layout& layout, const S* end) {
    for (std::int64_t lane = 0; lane < size; lane += kSide) {
      const S* row[kSide];
      for (std::int64_t i = 0; i < kSide; ++i) row[i] = data + layout.at(first + std::min(lane + i, size - 1));
      for (std::int64_t cls = 0; cls < classes; cls += kSide) {
        if (fetches_ahead<S>(cls))
          for (int i = 0; i < kSide; ++i) __builtin_prefetch(row[i] + cls + kAhead<S>, 0, 2);
        Vec<float> v[kSide];
        for (int i = 0; i < kSide; ++i) {
          const S* from = row[i] + cls;
          v[i] = end - from >= kSide ? load_lanes(from) : load_few_lanes(from, end - from);
        }
        transpose(v);
        const std::int64_t count = std::min<std::int64_t>(kSide, classes - cls);
        for (std::int64_t j = 0; j < count; ++j) store_lanes(logits(lane) + (cls + j) * stride, v[j]);
      }
    }
  }
  // Whole vectors: what they write past the end of a row is written again after them, because rows and tiles go in order,
  // and of a row the last classes first. From `last` on is what another thread writes, or what is not read yet.
  template <class S> void store_squares(S* data, const S* last) const {
    for (std::int64_t lane = 0; lane < size; lane += kSide) {
      const std::int64_t rows = std::min<std::int64_t>(kSide, size - lane);
      S* begin = data + lane * classes;
      for (std::int64_t cls = (classes - 1) / kSide * kSide; cls >= 0; cls -= kSide) {
        const std::int64_t count = std::min<std::int64_t>(kSide, classes - cls);
        Vec<float> v[kSide];
        for (int j = 0; j < kSide; ++j) v[j] = load_lanes(gradient(lane) + (cls + std::min<std::int64_t>(j, count - 1)) * stride);
        transpose(v);
        if (fetches_ahead<S>(cls))
          for (int i = 0; i < kSide; ++i) __builtin_prefetch(begin + i * classes + cls + kAhead<S>, 1, 2);
        for (std::int64_t i = 0; i < rows; ++i) {
          S* to = begin + i * classes + cls;
          last - to >= kSide ? store_lanes(to, v[i]) : store_few_lanes(to, v[i], count);
        }
      }
    }
  }

  std::vector<float> memory_;
  float* logits_;
};
