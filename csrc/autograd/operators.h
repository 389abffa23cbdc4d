// The operators of the backends as the autograd node calls them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <optional>
#include <string>

namespace dal {

using at::Tensor;
using Values = torch::jit::Stack;

struct Operator {
  const char* name;
  std::string full_name;
  std::int64_t id;  // no other operator's
  bool in_python;   // what calling it costs can be saved: replay.h
  c10::OperatorHandle handle;
};

// By their names in dal_kernels/ops.py, which says what they take and give.
struct Operators {
  std::string backend;
  std::int64_t id;  // its place among all of them
  Operator loss, loss_and_fields, loss_and_pace, gradient;
  // On a GPU the gradient that was written is changed there; on a CPU looking at the factor costs nothing.
  std::optional<Operator> scale_gradient, rewrite_gradient;

  Operators(const std::string& name, std::size_t place)
      : backend(name), id(static_cast<std::int64_t>(place)), loss(of("loss")), loss_and_fields(of("loss_and_fields")),
        loss_and_pace(of("loss_and_pace")), gradient(of("gradient")),
        scale_gradient(if_any("scale_gradient")), rewrite_gradient(if_any("rewrite_gradient")) {}

 private:
  std::optional<Operator> if_any(const char* name) const {
    static std::atomic<std::int64_t> count = 0;
    std::string full_name = std::string("dal_kernels::") + name + "_" + backend;
    const auto found = c10::Dispatcher::singleton().findSchema({full_name, ""});
    if (!found) return std::nullopt;
    return Operator{name, std::move(full_name), count++, backend == "triton", *found};
  }
  Operator of(const char* name) const {
    const std::optional<Operator> found = if_any(name);
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

}  // namespace dal
