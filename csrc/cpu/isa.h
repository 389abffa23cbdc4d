// Everything the row kernel needs from outside, included before an instruction set is switched on: standard
// functions must not be compiled for it, or the linker could hand them to a machine without it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "batch.h"

#if defined(__clang__)
#define DAL_PRAGMA(text) _Pragma(#text)
#define DAL_ISA_BEGIN(name) DAL_PRAGMA(clang attribute push(__attribute__((target(name))), apply_to = function))
#define DAL_ISA_END DAL_PRAGMA(clang attribute pop)
#else
#define DAL_PRAGMA(text) _Pragma(#text)
#define DAL_ISA_BEGIN(name) DAL_PRAGMA(GCC push_options) DAL_PRAGMA(GCC target(name))
#define DAL_ISA_END DAL_PRAGMA(GCC pop_options)
#endif
