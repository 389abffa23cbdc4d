// Stands in for torch's threads in what the thread sanitizer looks at, because torch's are OpenMP's, and the sanitizer does not
// see OpenMP's threads wait for each other: it would take every result of theirs for a race.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include <torch/csrc/stable/c/shim.h>

namespace {
constexpr std::int64_t kThreads = 4;
}

extern "C" {

AOTITorchError torch_get_num_threads(std::uint32_t* count) {
  *count = kThreads;
  return AOTI_TORCH_SUCCESS;
}

// The caller does the first share, as with torch's.
AOTITorchError torch_parallel_for(
    std::int64_t begin, std::int64_t end, std::int64_t grain, ParallelFunc function, void* context) {
  const std::int64_t least = std::max<std::int64_t>(1, grain);
  const std::int64_t share = std::max(least, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> others;
  for (std::int64_t first = begin + share; first < end; first += share)
    others.emplace_back(function, first, std::min(first + share, end), context);
  if (begin < end) function(begin, std::min(begin + share, end), context);
  for (std::thread& other : others) other.join();
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
