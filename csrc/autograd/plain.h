// Which calls need no more than kernels: plain tensors, and nothing around the call that would see its operators.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

namespace dal {

// What the key set of a strided tensor in the memory of a CPU or of a GPU has. Fake, functional, batched, conjugated and
// other tensors, and subclasses with a __torch_dispatch__, have more.
inline bool is_plain(const at::Tensor& tensor) {
  using Key = c10::DispatchKey;
  static const c10::DispatchKeySet usual(
      {Key::CPU, Key::CUDA, Key::AutogradCPU, Key::AutogradCUDA, Key::ADInplaceOrView, Key::AutocastCPU,
       Key::AutocastCUDA});
  return tensor.defined() && (tensor.key_set() | usual) == usual && (tensor.is_cpu() || tensor.is_cuda());
}

// Whether dispatch modes, torch.func transforms, torch.jit.trace, forward-mode differentiation or modes of
// __torch_function__ are around this call.
inline bool is_watched() {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included | c10::default_included_set) != c10::default_included_set ||
         at::impl::torch_function_mode_enabled() || torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

}  // namespace dal
