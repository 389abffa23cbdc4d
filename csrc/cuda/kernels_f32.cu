#define DAL_STORAGE float
#define DAL_SUFFIX f32
#define DAL_FLOATING 1
#include "kernels.cuh"
