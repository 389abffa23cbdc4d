// Reductions in a fixed order: the same bits in each run.
#pragma once

#include "element.cuh"

namespace dal {

struct Add {
  template <class T> DAL_D T operator()(T x, T y) const { return x + y; }
};
struct Larger {
  template <class T> DAL_D T operator()(T x, T y) const { return larger(x, y); }
};
struct Smaller {
  DAL_D unsigned operator()(unsigned x, unsigned y) const { return min(x, y); }
};

// The value of the lane whose number differs in the bits of STEP.
template <int STEP> DAL_D float exchange(float x) {
  float y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(y) : "f"(x), "n"(STEP));
  return y;
}
template <int STEP> DAL_D unsigned exchange(unsigned x) {
  unsigned y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(y) : "r"(x), "n"(STEP));
  return y;
}
template <int STEP> DAL_D double exchange(double x) { return __shfl_xor_sync(0xffffffffu, x, STEP); }

// Over a warp; each lane gets the same bits.
template <class Op, int STEP = 16, class T> DAL_D T across_warp(T x) {
  x = Op{}(x, exchange<STEP>(x));
  if constexpr (STEP > 1) return across_warp<Op, STEP / 2>(x);
  return x;
}
// Over groups of `lanes` neighbouring lanes, a power of two.
template <class Op, int STEP = 16, class T> DAL_D T across(T x, int lanes) {
  if (lanes == 2 * STEP) return across_warp<Op, STEP>(x);
  if constexpr (STEP > 1) return across<Op, STEP / 2>(x, lanes);
  return x;
}

// Over a block of whole warps; `scratch` (32) is not used again before another barrier.
template <class Op, class T> DAL_D T across_block(T x, T* scratch, T none) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  x = across_warp<Op>(x);
  if (warps == 1) return x;
  if (lane == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return across_warp<Op>(lane < warps ? scratch[lane] : none);
}

// The sum over `count` (at most 128) values that the threads left in `values`, for thread 0.
template <class A> DAL_D A sum_of_group(const A* values, int count) {
  if (threadIdx.x >= 32) return 0;
  A sum = 0;
#pragma unroll
  for (int i = 0; i < 128; i += 32)
    if (static_cast<int>(threadIdx.x) + i < count) sum += values[threadIdx.x + i];
  return across_warp<Add>(sum);
}

// Whether this block of `blocks` is the last to come here; what the others wrote before is then visible. The ticket
// counts from 0, and the last block brings it back there, for the next launch.
DAL_D bool is_last_block(unsigned* ticket, unsigned blocks) {
  if (blocks == 1) return true;
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(ticket, blocks - 1) + 1 == blocks;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace dal
