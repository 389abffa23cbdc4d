// What every CUDA operator does first: where its tensors lie, and who launches there.
#pragma once

#include "emulator.h"

#include <torch/csrc/stable/accelerator.h>

#include <memory>
#include <string>

#include "../tensors.h"
#include "arguments.h"
#include "kernels.h"

namespace dal {

inline Launcher launcher_for(const Place& place) {
  if (place.type == aoti_torch_device_type_cuda()) return Launcher(place.index, nullptr);
  Emulator* emulator = installed_emulator();
  require(emulator != nullptr, "backend 'cuda' takes CUDA tensors, got tensors on the CPU");
  return Launcher(-1, emulator);
}

// Kernels start on the current device, which need not be the tensors'.
inline std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_of(const Place& place) {
  if (place.type != aoti_torch_device_type_cuda()) return nullptr;
  return std::make_unique<torch::stable::accelerator::DeviceGuard>(place.index);
}

// A tensor that a kernel will touch: it must be where the logits are.
struct Touched {
  Launcher& launcher;
  Place place;
  void operator()(const char* name, const Tensor& tensor, std::size_t itemsize) const {
    if (tensor.numel() == 0) return;
    const Place here = Place::of(tensor);
    if (here.type != place.type || here.index != place.index)
      throw std::invalid_argument(std::string(name) + " must be on the device of logits");
    std::int64_t last = 0;
    for (std::int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    launcher.allow({name, reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()),
                    (static_cast<std::size_t>(last) + 1) * itemsize});
  }
};

// The pace in a launch of its own.
template <class A> void launch_follow(const Launcher& launcher, const Follow<A>& args) {
  const std::int64_t looked_at = ceil_div(args.rows.count, args.rows.every);
  const int threads = whole_warps(std::min<std::int64_t>(512, std::max<std::int64_t>(1, looked_at)));
  launcher.launch(kernels_of<A>().follow, {1, 1, threads}, args);
}

}  // namespace dal
