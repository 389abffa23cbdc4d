// Logits in memory: 16 bytes at a time where their alignment allows it, one by one at the ends of a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../batch.h"

#define DAL_D __device__ __forceinline__

namespace dal {

template <class S> constexpr int kWidth = 16 / static_cast<int>(sizeof(S));

// Powers of 2 for float: one instruction. Of e for double, which has none, and which a change of base costs digits.
template <class A> struct Base {
  static constexpr A exponent = A(1.44269504088896340736), ln = A(0.69314718055994530942);
};
template <> struct Base<double> {
  static constexpr double exponent = 1, ln = 1;
};
template <class A> constexpr A kToExponent = Base<A>::exponent;  // of the base, from a difference of logits
template <class A> constexpr A kLnBase = Base<A>::ln;            // back again
// The power of this (and of -inf) is 0, to either base; as an exponent in its place it keeps a product with that at 0
// too.
template <class A> constexpr A kLowest = A(-1100);

template <class A> DAL_D A negative_infinity();
template <> DAL_D float negative_infinity<float>() { return __int_as_float(0xff800000); }
template <> DAL_D double negative_infinity<double>() { return -__longlong_as_double(0x7ff0000000000000ll); }
template <class A> DAL_D A not_a_number();
template <> DAL_D float not_a_number<float>() { return __int_as_float(0x7fc00000); }
template <> DAL_D double not_a_number<double>() { return __longlong_as_double(0x7ff8000000000000ll); }

// One instruction; what is below 2^-126 becomes 0.
DAL_D float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DAL_D double power(double x) { return exp(x); }

// Both give the other operand where one is NaN.
DAL_D float larger(float x, float y) { return fmaxf(x, y); }
DAL_D double larger(double x, double y) { return fmax(x, y); }

// A value that the compiler takes for another one, so that it computes again what it would otherwise keep.
DAL_D int opaque(int x) {
  int y;
  asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// The larger again, of a value that the compiler then keeps: it would make it a second time from what it was made of.
DAL_D float kept_larger(float x, float y) {
  float z;
  asm volatile("max.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
DAL_D double kept_larger(double x, double y) { return fmax(x, y); }

// ---- storage <-> arithmetic, one value

DAL_D float widen(float x) { return x; }
DAL_D double widen(double x) { return x; }
DAL_D float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
DAL_D float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

DAL_D void narrow(float x, float& to) { to = x; }
DAL_D void narrow(double x, double& to) { to = x; }
DAL_D void narrow(float x, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
DAL_D void narrow(float x, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }

// ---- 16 bytes, kWidth values

DAL_D void widen_word(unsigned word, float* v, BFloat16) {
  // The bits, shifted into place, are the float: no move between registers of two kinds.
  asm("shl.b32 %0, %1, 16;" : "=f"(v[0]) : "r"(word));
  asm("and.b32 %0, %1, 0xffff0000;" : "=f"(v[1]) : "r"(word));
}
DAL_D void widen_word(unsigned word, float* v, Float16) {
  v[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
  v[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
template <class Pair> DAL_D unsigned bits_of(Pair pair) {
  static_assert(sizeof(pair) == 4, "two halves");
  return *reinterpret_cast<unsigned*>(&pair);
}
DAL_D unsigned narrow_word(const float* v, BFloat16) { return bits_of(__floats2bfloat162_rn(v[0], v[1])); }
DAL_D unsigned narrow_word(const float* v, Float16) { return bits_of(__floats2half2_rn(v[0], v[1])); }

// 16 bytes. OWN: which the kernel may write itself; else nobody does while it runs, and they come by the way of constant
// memory, on which nothing is said of a load after a store.
template <bool OWN, class Raw> DAL_D Raw load_raw(const void* from) {
  const Raw* const at = static_cast<const Raw*>(from);
  if constexpr (OWN) return *at;
  return __ldg(at);
}
template <bool OWN = false> DAL_D void load_vector(const float* from, float* v) {
  const float4 raw = load_raw<OWN, float4>(from);
  v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
}
template <bool OWN = false> DAL_D void load_vector(const double* from, double* v) {
  const double2 raw = load_raw<OWN, double2>(from);
  v[0] = raw.x, v[1] = raw.y;
}
template <bool OWN = false, class S> DAL_D void load_vector(const S* from, float* v) {
  const uint4 raw = load_raw<OWN, uint4>(from);
  widen_word(raw.x, v, S{});
  widen_word(raw.y, v + 2, S{});
  widen_word(raw.z, v + 4, S{});
  widen_word(raw.w, v + 6, S{});
}
DAL_D void store_vector(float* to, const float* v) { *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]}; }
DAL_D void store_vector(double* to, const double* v) { *reinterpret_cast<double2*>(to) = {v[0], v[1]}; }
template <class S> DAL_D void store_vector(S* to, const float* v) {
  *reinterpret_cast<uint4*>(to) = {
      narrow_word(v, S{}), narrow_word(v + 2, S{}), narrow_word(v + 4, S{}), narrow_word(v + 6, S{})};
}

// ---- a run of elements, seen as vectors

template <class S> DAL_D int elements_past_boundary(const S* address) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(address) % 16 / sizeof(S));
}

// `size` elements at any address, as aligned vectors of 16 bytes: vector k holds the elements k V - lead and on. Those
// from `first` on, `full` of them, may be moved as a whole; the others, one at either end, lie over the edge.
template <class S> struct Window {
  int size, lead, begin, vectors, first, full;

  DAL_D Window(int size, int lead) : size(size), lead(lead), begin(0) {
    constexpr int V = kWidth<S>;
    vectors = (lead + size + V - 1) / V;
    first = lead ? 1 : 0;
    full = max((lead + size) / V - first, 0);
  }
  // Only vectors [begin, end) of it.
  DAL_D void clip(int from, int end) {
    begin = from;
    vectors = min(vectors, end);
    const int last = min(first + full, end);
    first = max(first, from);
    full = max(last - first, 0);
  }
  // For an address whose vectors lie elsewhere: element by element.
  DAL_D void misalign() { full = 0; }

  // The classes of these vectors.
  DAL_D int begin_element() const { return max(at(begin), 0); }
  DAL_D int end_element() const { return min(at(vectors), size); }

  DAL_D int elements() const { return max(end_element() - begin_element(), 0); }

  DAL_D int at(int k) const { return k * kWidth<S> - lead; }
  // Whether element i of vector k is one of the run's.
  DAL_D bool holds(int k, int i) const {
    return static_cast<unsigned>(at(k) + i) < static_cast<unsigned>(k < vectors ? size : 0);
  }
  DAL_D bool whole(int k) const { return static_cast<unsigned>(k - first) < static_cast<unsigned>(full); }

  // Vector k of the run at `from`; `rest` where there is none. OWN as of load_vector.
  template <bool OWN = false> DAL_D void load(const S* from, int k, Arithmetic<S>* v, Arithmetic<S> rest) const {
    constexpr int V = kWidth<S>;
    if (whole(k)) {
      load_vector<OWN>(from + at(k), v);
      return;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = rest;
    if (k < vectors) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (static_cast<unsigned>(at(k) + i) < static_cast<unsigned>(size)) v[i] = widen(from[at(k) + i]);
    }
  }
  DAL_D void store(S* to, int k, const Arithmetic<S>* v) const {
    constexpr int V = kWidth<S>;
    if (whole(k)) {
      store_vector(to + at(k), v);
    } else if (k < vectors) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (static_cast<unsigned>(at(k) + i) < static_cast<unsigned>(size)) narrow(v[i], to[at(k) + i]);
    }
  }
};

// The windows of a row that is read and of the gradient that is written: the same vectors if their alignment agrees.
// Otherwise whole vectors are written, which costs most, and elements read.
template <class S> struct Windows {
  Window<S> in, out;
  // `whole`: known to be whole aligned vectors.
  DAL_D Windows(const S* z, const S* gradient, int size, bool whole = false)
      : in(size, whole ? 0 : elements_past_boundary(gradient ? gradient : z)), out(in) {
    if (!whole && elements_past_boundary(z) != in.lead) in.misalign();
  }
  DAL_D void clip(int from, int end) {
    in.clip(from, end);
    out.clip(from, end);
  }
};

}  // namespace dal
