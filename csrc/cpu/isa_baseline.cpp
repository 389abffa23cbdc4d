// The row kernel for any machine: SSE2, NEON, or what the compiler makes of 16-byte vectors.
#include "isa.h"

#define DAL_VECTOR_BYTES 16
#define DAL_HAS_F16C 0
namespace dal {
namespace baseline {
#include "lanes.h"
#include "row_vector.h"
#include "row.h"
extern const RowKernels kernels = all_row_kernels<>();
}  // namespace baseline
}  // namespace dal
