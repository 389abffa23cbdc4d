// The operators that only keep the pace of DAL, on CUDA tensors. A launch each; nothing here waits for the device.
#include "operator.h"

namespace dal {
namespace {

template <class A>
void follow_alone(const Tensor& numbers, Follow<A> args, const std::vector<Tensor>& rows) {
  const Place place = Place::of(numbers);
  const auto guard = guard_of(place);
  Launcher launcher = launcher_for(place);
  args.pace = pace_of(numbers);
  const Touched touched{launcher, place};
  touched("numbers", numbers, sizeof(float));
  for (const Tensor& values : rows)
    touched("statistics", values, values.scalar_type() == ScalarType::Float ? sizeof(float) : 8);
  launch_follow(launcher, args);
}

void see_cuda(
    Tensor numbers, Tensor max_prob, Tensor target_prob, Tensor prediction, Tensor target, std::int64_t every,
    double q_end, double max_weight) {
  const auto follow_rows = [&](auto arithmetic) {
    using A = decltype(arithmetic);
    Follow<A> args{};
    args.rows = pace_rows<A>(max_prob, target_prob, prediction, target, every);
    args.limits = {q_end, max_weight};
    follow_alone(numbers, args, {max_prob, target_prob, prediction, target});
  };
  max_prob.scalar_type() == ScalarType::Double ? follow_rows(double{}) : follow_rows(float{});
}

void keep_pace_cuda(
    Tensor numbers, double bound, double q_start, double opening, double q_end, double max_weight) {
  Follow<float> args{};
  args.rows.every = 1;
  args.limits = {q_end, max_weight};
  args.sets_bound = true;
  args.bound = static_cast<float>(bound);
  args.q_start = static_cast<float>(q_start);
  args.opening = static_cast<float>(opening);
  follow_alone(numbers, args, {});
}

}  // namespace
}  // namespace dal

STABLE_TORCH_LIBRARY_FRAGMENT(dal_kernels, m) {
  m.def("see_cuda(" DAL_SEE_ARGUMENTS ") -> ()");
  m.def("keep_pace_cuda(" DAL_KEEP_PACE_ARGUMENTS ") -> ()");
}

// CPU tensors: for an emulator.
#define DAL_CUDA_PACE_OPERATORS(m)            \
  m.impl("see_cuda", TORCH_BOX(&dal::see_cuda)); \
  m.impl("keep_pace_cuda", TORCH_BOX(&dal::keep_pace_cuda))

STABLE_TORCH_LIBRARY_IMPL(dal_kernels, CPU, m) { DAL_CUDA_PACE_OPERATORS(m); }
STABLE_TORCH_LIBRARY_IMPL(dal_kernels, CUDA, m) { DAL_CUDA_PACE_OPERATORS(m); }
