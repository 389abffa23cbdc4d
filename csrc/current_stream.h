// torch's current CUDA stream, found at run time: a CPU-only torch has no such function, and must load what asks.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

namespace dal {

inline void* current_stream(int device) {
  using Get = std::int32_t (*)(std::int32_t, void**);
  static const Get get = [] {
    void* symbol = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    if (!symbol)
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
        symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Get>(symbol);
  }();
  if (!get) throw std::runtime_error("this torch has no CUDA streams: it was built without CUDA");
  void* stream = nullptr;
  if (get(device, &stream) != 0) throw std::runtime_error("torch did not name its current CUDA stream");
  return stream;
}

}  // namespace dal
