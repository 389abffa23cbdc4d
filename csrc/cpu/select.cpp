// Picks the instruction set once, when the library is loaded.
#include <cstdlib>
#include <string>

#include "batch.h"

namespace dal {
namespace {

struct Choice {
  const RowKernels* kernels;
  const char* name;
};

// ATEN_CPU_CAPABILITY (default, avx2, avx512) caps the choice, as it does for torch's own kernels; AVX512-BF16 is above
// all of them.
Choice choose() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string cap = variable ? variable : "";
  // All with AVX2, FMA and BMI2 have F16C too, which older compilers cannot ask for.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  static const RowKernels v4_bf16 = [] {
    RowKernels kernels = x86_v4::kernels;
    kernels.bf16 = x86_v4_bf16::kernel;
    return kernels;
  }();
  if (v4 && cap.empty() && __builtin_cpu_supports("avx512bf16")) return {&v4_bf16, "x86-64-v4, AVX512-BF16"};
  if (v4 && cap != "default" && cap != "avx2") return {&x86_v4::kernels, "x86-64-v4"};
  if (v3 && cap != "default") return {&x86_v3::kernels, "x86-64-v3"};
#endif
  return {&baseline::kernels, "baseline"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const RowKernels& row_kernels() { return *choice().kernels; }
const char* row_kernels_name() { return choice().name; }

bool bfloat16_products_are_fast() {
#if defined(__x86_64__)
  // On Intel's processors AVX512-BF16 makes as many products a cycle as float32 has, and packing comes on top; AMX, which
  // makes many times as many, is not looked for here.
  return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

}  // namespace dal
