#include "launch.h"

#include <cuda_runtime_api.h>

#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "../current_stream.h"

namespace dal {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(error));
}

Device describe(int index) {
  int major = 0, minor = 0, multiprocessors = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "reading the compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "reading the compute capability");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index), "counting multiprocessors");
  return {10 * major + minor, multiprocessors};
}

bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "asking whether a graph is captured");
  return status != cudaStreamCaptureStatusNone;
}

// Memory that is never given back, not torch's: what that hands out while somebody warms up for a graph belongs to the
// graph. Null where there is none left.
void* new_memory() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // another thread may be capturing
  check(cudaThreadExchangeStreamCaptureMode(&mode), "allocating");
  void* data = nullptr;
  if (cudaMalloc(&data, kStanding) != cudaSuccess) cudaGetLastError();
  check(cudaThreadExchangeStreamCaptureMode(&mode), "allocating");
  return data;
}

}  // namespace

Launcher::Launcher(int index, Emulator* emulator) : index_(index), emulator_(emulator) {
  if (!emulator_) stream_ = current_stream(index);
}

Device Launcher::device() const {
  if (emulator_) return emulator_->device;
  static std::mutex mutex;
  static std::vector<Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  while (static_cast<int>(known.size()) <= index_) known.push_back(describe(static_cast<int>(known.size())));
  return known[index_];
}

void Launcher::fill(void* data, int byte, std::size_t bytes) const {
  if (emulator_)
    std::memset(data, byte, bytes);
  else
    check(cudaMemsetAsync(data, byte, bytes, static_cast<cudaStream_t>(stream_)), "cudaMemsetAsync");
}

void* Launcher::standing(std::int64_t bytes) const {
  const auto stream = static_cast<cudaStream_t>(stream_);
  // The handle of a thread's own stream is another stream in each thread.
  if (emulator_ || bytes > kStanding || stream == cudaStreamPerThread || is_captured(stream)) return nullptr;
  static std::mutex mutex;
  static auto* known = new std::map<std::pair<int, void*>, void*>;  // a thread may outlive what is taken down
  const std::lock_guard<std::mutex> lock(mutex);
  void*& memory = (*known)[{index_, stream_}];
  if (!memory) {
    void* const made = new_memory();
    if (made) fill(made, 0, sizeof(unsigned));
    memory = made;
  }
  return memory;
}

void Launcher::start(const Kernel& kernel, const Grid& grid, const void* arguments, std::size_t bytes) const {
  if (grid.x > 0x7fffffff || grid.y > 0xffff) throw std::invalid_argument("input has more rows than a launch can take");
  if (emulator_) {
    emulator_->run(kernel.name, grid, arguments, bytes, buffers_);
    return;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream_);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  void* parameters[] = {const_cast<void*>(arguments)};
  check(cudaLaunchKernelExC(&config, kernel.function, parameters), kernel.name);
}

}  // namespace dal
