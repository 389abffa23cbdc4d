// Starting a kernel: on the current stream of a device or, for CPU tensors, in an emulator that somebody installed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "plan.h"

namespace dal {

struct Grid {
  std::int64_t x;
  std::int64_t y = 1;
  int threads;
  int shared = 0;   // bytes of dynamic shared memory
  int cluster = 1;  // neighbouring blocks
};

// Memory that a kernel may touch, for an emulator to check against.
struct Buffer {
  const char* name;
  std::uintptr_t address;
  std::size_t bytes;
};

// Runs kernels of a module that was compiled from the same source; raises what goes wrong.
struct Emulator {
  Device device;
  virtual void run(
      const char* kernel, const Grid& grid, const void* arguments, std::size_t bytes,
      const std::vector<Buffer>& buffers) = 0;
  virtual ~Emulator() = default;
};

constexpr std::int64_t kStanding = 1 << 16;

// One operator's launches. `index`: of a CUDA device, or -1 for the emulator.
class Launcher {
 public:
  Launcher(int index, Emulator* emulator);
  Device device() const;
  void fill(void* data, int byte, std::size_t bytes) const;
  // Memory of the stream, whose kernels follow each other, with a ticket in front: a zero that a kernel counts from and
  // leaves as a zero. Null where a launch must have its own: for more than kStanding bytes; in a graph that is captured,
  // because it may be replayed beside that stream; and in the emulator, where a kernel may fail and the next one run.
  void* standing(std::int64_t bytes) const;
  template <class Arguments>
  void launch(const Kernel& kernel, const Grid& grid, const Arguments& arguments) const {
    static_assert(std::is_trivially_copyable_v<Arguments>, "kernels take their arguments as bytes");
    start(kernel, grid, &arguments, sizeof(arguments));
  }
  // The emulator lets kernels touch nothing else.
  void allow(const Buffer& buffer) {
    if (emulator_ && buffer.bytes) buffers_.push_back(buffer);
  }

 private:
  void start(const Kernel& kernel, const Grid& grid, const void* arguments, std::size_t bytes) const;
  int index_;
  Emulator* emulator_;
  void* stream_ = nullptr;
  std::vector<Buffer> buffers_;
};

}  // namespace dal
