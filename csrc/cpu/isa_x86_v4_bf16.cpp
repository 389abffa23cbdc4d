// The bfloat16 row kernel for AVX-512 with its instruction that rounds to bfloat16, for which the rest of x86-64-v4 takes
// several.
#include "isa.h"

#if defined(__x86_64__)
#define DAL_VECTOR_BYTES 64
#define DAL_HAS_F16C 1
#define DAL_HAS_BF16 1
DAL_ISA_BEGIN("arch=x86-64-v4,avx512bf16")
namespace dal {
namespace x86_v4_bf16 {
#include "lanes.h"
#include "row_vector.h"
#include "row.h"
extern const RowKernel<BFloat16> kernel = row_kernel<BFloat16>();
}  // namespace x86_v4_bf16
}  // namespace dal
DAL_ISA_END
#endif
