#define DAL_STORAGE Float16
#define DAL_SUFFIX f16
#define DAL_FLOATING 0
#include "kernels.cuh"
