// What a row is read to, and what is made of that, for any arithmetic type: of one row, and on a CPU of a vector of rows.
// The CPU kernels include the same files again for an instruction set (cpu/row_vector.h), because functions that were
// compiled without it cannot take in those of its vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define DAL_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DAL_HD inline __attribute__((always_inline))
#else
#define DAL_HD inline
#endif

namespace dal {

// A number that is one for all rows of a vector, like a knob or the number of classes; of one row any number is.
template <class A, class = void> struct ScalarOf { using Type = A; };
template <class A> struct ScalarOf<A, std::void_t<typename A::Scalar>> { using Type = typename A::Scalar; };
template <class A> using Scalar = typename ScalarOf<A>::Type;

#include "row_sums.h"
#include "affine_gradient.h"
#include "probability_losses.h"
#include "objective.h"

}  // namespace dal
