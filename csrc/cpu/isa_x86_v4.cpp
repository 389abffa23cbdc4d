// The row kernel for x86-64-v4: AVX-512.
#include "isa.h"

#if defined(__x86_64__)
#define DAL_VECTOR_BYTES 64
#define DAL_HAS_F16C 1
DAL_ISA_BEGIN("arch=x86-64-v4")
namespace dal {
namespace x86_v4 {
#include "lanes.h"
#include "row_vector.h"
#include "row.h"
extern const RowKernels kernels = all_row_kernels<>();
}  // namespace x86_v4
}  // namespace dal
DAL_ISA_END
#endif
