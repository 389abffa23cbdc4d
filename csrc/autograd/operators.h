// The operators of the backends as the autograd node calls them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <deque>
#include <mutex>
#include <optional>
#include <string>

namespace dal {

using at::Tensor;
using Values = torch::jit::Stack;

// By their names in dal_kernels/ops.py, which says what they take and give.
struct Operators {
  std::string backend;
  std::int64_t id;  // its place among all of them
  c10::OperatorHandle loss, loss_and_fields, loss_and_pace, gradient, see;
  // On a GPU the gradient that was written is changed there; on a CPU looking at the factor costs nothing.
  std::optional<c10::OperatorHandle> scale_gradient, rewrite_gradient;

  Operators(const std::string& name, std::size_t place)
      : backend(name), id(static_cast<std::int64_t>(place)), loss(of("loss")), loss_and_fields(of("loss_and_fields")),
        loss_and_pace(of("loss_and_pace")), gradient(of("gradient")), see(of("see")),
        scale_gradient(if_any("scale_gradient")), rewrite_gradient(if_any("rewrite_gradient")) {}

 private:
  std::optional<c10::OperatorHandle> if_any(const char* name) const {
    return c10::Dispatcher::singleton().findSchema({std::string("dal_kernels::") + name + "_" + backend, ""});
  }
  c10::OperatorHandle of(const char* name) const {
    const std::optional<c10::OperatorHandle> found = if_any(name);
    TORCH_CHECK(found, "backend ", backend, " has no operator ", name);
    return *found;
  }
};

// Of all backends that have been called. Not taken down: a thread of autograd may outlive the interpreter.
struct AllOperators {
  std::mutex mutex;  // a backward may look one up while a forward of another thread adds one
  std::deque<Operators> all;
};
inline AllOperators& all_operators() {
  static auto* made = new AllOperators;
  return *made;
}

inline const Operators& operators_of(const std::string& backend) {
  auto& [mutex, all] = all_operators();
  const std::lock_guard lock(mutex);
  for (const Operators& each : all)
    if (each.backend == backend) return each;
  return all.emplace_back(backend, all.size());
}

inline const Operators& operators_of(std::int64_t id) {
  auto& [mutex, all] = all_operators();
  const std::lock_guard lock(mutex);
  return all[static_cast<std::size_t>(id)];
}

inline Values called(const c10::OperatorHandle& op, Values values) {
  op.callBoxed(values);
  return values;
}

}  // namespace dal
