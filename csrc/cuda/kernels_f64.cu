#define DAL_STORAGE double
#define DAL_SUFFIX f64
#define DAL_FLOATING 2
#include "kernels.cuh"
