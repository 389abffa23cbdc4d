// Instantiates the kernels of DAL_STORAGE, under names that end in DAL_SUFFIX: a profiler shows them, tests launch by
// them. DAL_FLOATING: 0 for a rounded storage type, 1 for float, 2 for double, which has loops only.
#include "gradient.cuh"
#include "kernels.h"
#include "long_rows.cuh"
#include "rows.cuh"
#include "rows_apart.cuh"
#include "short_rows.cuh"

#define DAL_PASTE(name, suffix) dal_##name##_##suffix
#define DAL_SYMBOL(name, suffix) DAL_PASTE(name, suffix)
#define DAL_QUOTE(name, suffix) "dal_" #name "_" #suffix
#define DAL_STRING(name, suffix) DAL_QUOTE(name, suffix)

// One block a multiprocessor is enough: the rows it keeps take most of the registers.
#define DAL_KERNEL(threads, name, Arguments, function)         \
  extern "C" __global__ void __launch_bounds__(threads, 1)     \
      DAL_SYMBOL(name, DAL_SUFFIX)(const __grid_constant__ Arguments<Storage> args) { function(args); }
#define DAL_FORWARD_KERNEL(threads, name, function) DAL_KERNEL(threads, name, Forward, function)
#define DAL_ENTRY(threads, name, function) \
  {DAL_STRING(name, DAL_SUFFIX), reinterpret_cast<const void*>(&DAL_SYMBOL(name, DAL_SUFFIX))},
#define DAL_NO_ENTRY(threads, name, function) {nullptr, nullptr},

namespace dal {

using Storage = DAL_STORAGE;

#if DAL_FLOATING < 2
DAL_REGISTER_KERNELS(DAL_FORWARD_KERNEL)
#define DAL_REGISTER_ENTRY DAL_ENTRY
#else
#define DAL_REGISTER_ENTRY DAL_NO_ENTRY
#endif
DAL_LOOPING_KERNELS(DAL_FORWARD_KERNEL)
DAL_KERNEL(256, gradient, Backward, (gradient_rows<Storage, false>))
DAL_KERNEL(256, gradient_wide, Backward, (gradient_rows<Storage, true>))
DAL_KERNEL(256, gradient_apart, Backward, (gradient_rows_apart<Storage, false>))
DAL_KERNEL(256, gradient_apart_wide, Backward, (gradient_rows_apart<Storage, true>))
DAL_KERNEL(512, statistics, SumsBatch, row_statistics)
#if DAL_FLOATING > 0
DAL_KERNEL(256, scale, Rescale, scale_gradient)
DAL_KERNEL(512, follow, Follow, follow_rows)
#define DAL_FLOATING_ENTRY DAL_ENTRY
#else
#define DAL_FLOATING_ENTRY DAL_NO_ENTRY
#endif

template <> const Kernels& kernels_of<Storage>() {
  static const Kernels table{
      {DAL_REGISTER_KERNELS(DAL_REGISTER_ENTRY) DAL_LOOPING_KERNELS(DAL_ENTRY)},
      DAL_ENTRY(, gradient, ) DAL_ENTRY(, gradient_wide, )
      DAL_ENTRY(, gradient_apart, ) DAL_ENTRY(, gradient_apart_wide, )
      DAL_ENTRY(, statistics, ) DAL_FLOATING_ENTRY(, scale, ) DAL_FLOATING_ENTRY(, follow, )};
  return table;
}

}  // namespace dal
