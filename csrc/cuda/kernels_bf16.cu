#define DAL_STORAGE BFloat16
#define DAL_SUFFIX bf16
#define DAL_FLOATING 0
#include "kernels.cuh"
