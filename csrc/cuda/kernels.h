// The compiled kernels of each storage type, for whoever launches them.
#pragma once

namespace dal {

// X(threads at most, name, device function). A number is of values that a lane keeps; `w`: rows of whole vectors; wide:
// losses that sum over all classes (row_sums.h).
#define DAL_REGISTER_KERNELS(X)                                                 \
  X(128, short4, (loss_short_rows<Storage, 1, 4>))                              \
  X(128, short8, (loss_short_rows<Storage, 5, 8>))                              \
  X(128, short10, (loss_short_rows<Storage, 9, 10>))                            \
  X(128, short16, (loss_short_rows<Storage, 11, 16>))                           \
  X(128, short24, (loss_short_rows<Storage, 17, 24>))                           \
  X(128, short32, (loss_short_rows<Storage, 25, 32>))                           \
  X(128, lanes8w, (loss_rows_of_lanes<Storage, 8, Rows::kWhole>))               \
  X(128, lanes16w, (loss_rows_of_lanes<Storage, 16, Rows::kWhole>))             \
  X(128, lanes32w, (loss_rows_of_lanes<Storage, 32, Rows::kWhole>))             \
  X(128, lanes64w, (loss_rows_of_lanes<Storage, 64, Rows::kWhole>))             \
  X(128, lanes64, (loss_rows_of_lanes<Storage, 64, Rows::kAny>))                \
  X(256, block128w, (loss_row_of_block<Storage, 128, Rows::kWhole>))            \
  X(256, block128, (loss_row_of_block<Storage, 128, Rows::kAny>))               \
  X(256, cluster128w, (loss_row_of_cluster<Storage, 128, Rows::kWhole>))        \
  X(256, cluster128, (loss_row_of_cluster<Storage, 128, Rows::kAny>))           \
  X(256, apart8, (loss_rows_apart<Storage, 1, 8, false>))                       \
  X(256, apart16, (loss_rows_apart<Storage, 8, 16, false>))                     \
  X(256, apart24, (loss_rows_apart<Storage, 16, 24, false>))                    \
  X(256, apart32, (loss_rows_apart<Storage, 24, 32, false>))                    \
  X(256, apart48, (loss_rows_apart<Storage, 32, 48, false>))                    \
  X(256, apart32_wide, (loss_rows_apart<Storage, 1, 32, true>))                 \
  X(256, apart48_wide, (loss_rows_apart<Storage, 32, 48, true>))
#define DAL_LOOPING_KERNELS(X)                                                  \
  X(512, long_rows, (loss_long_rows<Storage, false>))                           \
  X(512, split_rows, (loss_split_rows<Storage, false>))                         \
  X(512, long_rows_wide, (loss_long_rows<Storage, true>))                       \
  X(512, split_rows_wide, (loss_split_rows<Storage, true>))

#define DAL_NAME(threads, name, function) name,
enum class ForwardKernel { DAL_REGISTER_KERNELS(DAL_NAME) DAL_LOOPING_KERNELS(DAL_NAME) count };
#undef DAL_NAME

struct Kernel {
  const char* name;
  const void* function;  // for cudaLaunchKernel; null where there is none
};

struct Kernels {
  // Parameters by value: Forward<S>, Backward<S>, SumsBatch<S>, Rescale<S>, Follow<S> of arguments.h and batch.h.
  Kernel forward[static_cast<int>(ForwardKernel::count)];
  Kernel gradient, gradient_wide, gradient_apart, gradient_apart_wide, statistics, scale, follow;
};
template <class S> const Kernels& kernels_of();

}  // namespace dal
