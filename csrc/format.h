// The four ways a logit is stored, and the type its arithmetic is done in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "formulas.h"

namespace dal {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class Storage>
struct Format {
  using Arithmetic = float;
};
template <>
struct Format<double> {
  using Arithmetic = double;
};
template <class Storage>
using Arithmetic = typename Format<Storage>::Arithmetic;

}  // namespace dal
