"""The functions of a vector of numbers, which no library makes, against those of one number in double."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dal_kernels import available_backends
from support.capabilities import CAPABILITIES, available_capabilities
from support.compiling import needs_compiler, output_of

# By instruction set of csrc/cpu/isa_*.cpp: bytes of a vector, and what the compiler is told.
ISAS = {"baseline": (16, ""), "x86-64-v3": (32, "arch=x86-64-v3"), "x86-64-v4": (64, "arch=x86-64-v4")}

# ulps of the result, and the numbers it is asked of, as bits of a float, from, to and every how many.
ONE, LARGEST, SMALLEST, MINUS_88, MINUS_TINY = 0x3F800000, 0x7F7FFFFF, 0x00800000, 0xC2B00000, 0x80800000
HALF, TENTH, HUNDRED, MINUS_ONE = 0x3F000000, 0x3DCCCCCD, 0x42C80000, 0xBF800000
FUNCTIONS = {
    "logarithm(x)": ("std::log(x)", 1, LARGEST, 397, 1.0),
    "logarithm(x) near 1": ("std::log(x)", ONE - 200_000, ONE + 400_000, 1, 1.0),
    "exponential(x)": ("std::exp(x)", MINUS_TINY, MINUS_88 - 200_000, 397, 2.5),
    "expm1_nonpositive(x, exponential(x))": ("std::expm1(x)", MINUS_TINY, MINUS_88, 397, 3.0),
    "exponential(x) above 0": ("std::exp(x)", SMALLEST, 0x42B00000, 397, 2.5),
    "log1p(x)": ("std::log1p(x)", SMALLEST, LARGEST, 397, 1.5),
    "log1p(x) below 0": ("std::log1p(x)", MINUS_TINY, MINUS_ONE, 397, 1.5),
    # 2 |y ln x| + 3, because a last digit of y ln x weighs as much: 16 of 3.5 ln 100, and 11.5 of 2.5 ln 100.
    "pow(x, 3.5f)": ("std::pow(x, 3.5)", TENTH, HUNDRED, 97, 35.0),
    "pow(x, -2.5f)": ("std::pow(x, -2.5)", TENTH, HUNDRED, 97, 26.0),
    "sqrt(x)": ("std::sqrt(x)", 1, LARGEST, 397, 0.5),
    "arcsine_ratio(x)": ("std::asin(std::sqrt(x)) / std::sqrt(x)", SMALLEST, HALF, 97, 1.0),
}

PROGRAM = """
#include <cstdio>
#include "isa.h"
#define DAL_VECTOR_BYTES {bytes}
#define DAL_HAS_F16C {f16c}
{begin}
namespace dal {{ namespace here {{
#include "lanes.h"
#include "row_vector.h"
{functions}
}} }}
{end}
template <class F, class G> double worst(F found, G exact, std::uint32_t from, std::uint32_t to, std::uint32_t step) {{
  double most = 0;
  for (std::uint64_t first = from; first <= to; first += dal::here::kRows * step) {{
    float x[dal::here::kRows], y[dal::here::kRows];
    for (int i = 0; i < dal::here::kRows; ++i) {{
      const std::uint32_t bits = std::min<std::uint64_t>(first + i * step, to);
      std::memcpy(&x[i], &bits, 4);
    }}
    found(x, y);
    for (int i = 0; i < dal::here::kRows; ++i) {{
      const double truth = exact(static_cast<double>(x[i]));
      int exponent;
      std::frexp(truth, &exponent);
      const double ulps = std::abs(y[i] - truth) / std::ldexp(1.0, exponent - 24);
      if (!(ulps <= most)) most = y[i] == truth ? most : ulps;
    }}
  }}
  return most;
}}
int main() {{
  const float inf = std::numeric_limits<float>::infinity();
  float special[dal::here::kRows] = {{0.0f, 1.0f, inf, inf - inf}};
  float logs[dal::here::kRows], powers[dal::here::kRows];
  dal::here::function0(special, logs);
  float low[dal::here::kRows] = {{0.0f, -200.0f, -inf, inf - inf}};
  dal::here::function2(low, powers);
  float bases[dal::here::kRows] = {{0.0f, inf, inf - inf, 1e-40f}}, raised[dal::here::kRows], sums[dal::here::kRows];
  dal::here::function7(bases, raised);
  float none[dal::here::kRows] = {{-1.0f, 0.0f, inf - inf, -inf}};
  dal::here::function6(none, sums);
  const bool right = logs[0] == -inf && logs[1] == 0 && logs[2] == inf && logs[3] != logs[3] && powers[0] == 1 &&
                     powers[1] == 0 && powers[2] == 0 && powers[3] != powers[3] && raised[0] == 0 &&
                     raised[1] == inf && raised[2] != raised[2] && raised[3] == 0 && sums[0] == -inf &&
                     sums[1] == 0 && sums[2] != sums[2] && sums[3] != sums[3];
  std::printf("[%s{results}]", right ? "true" : "false"{calls});
}}
"""


def program_of(isa: str) -> str:
    size, target = ISAS[isa]
    functions, calls = "", ""
    for index, (name, (truth, first, last, step, _)) in enumerate(FUNCTIONS.items()):
        expression = re.split(" near| above| below", name)[0]
        functions += (
            f"void function{index}(const float* from, float* to) {{ RowVector x; std::memcpy(&x, from, sizeof(x)); "
            f"x = {expression}; std::memcpy(to, &x, sizeof(x)); }}\n"
        )
        calls += f", worst(dal::here::function{index}, [](double x) {{ return {truth}; }}, {first}u, {last}u, {step}u)"
    return PROGRAM.format(
        bytes=size,
        f16c=int(bool(target)),
        begin=f'DAL_ISA_BEGIN("{target}")' if target else "",
        end="DAL_ISA_END" if target else "",
        functions=functions,
        calls=calls,
        results=", %.17g" * len(FUNCTIONS),
    )


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_functions_of_vectors_keep_their_bounds(isa: str, tmp_path: Path) -> None:
    available = available_capabilities(torch.backends.cpu.get_cpu_capability(), available_backends()["cpu"])
    if isa not in [CAPABILITIES[capability] for capability in available]:
        pytest.skip("this machine cannot run it")
    special_are_right, *ulps = json.loads(output_of(program_of(isa), tmp_path, "-O2"))
    assert special_are_right
    for (name, (*_, bound)), found in zip(FUNCTIONS.items(), ulps, strict=True):
        assert found <= bound, f"{name}: {found} ulp"
