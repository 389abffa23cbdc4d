// The operators that only keep the pace of DAL, on CPU tensors.
#include "../tensors.h"
#include "follow.h"

namespace dal {
namespace {

void see_cpu(
    Tensor numbers, Tensor max_prob, Tensor target_prob, Tensor prediction, Tensor target, std::int64_t every,
    double q_end, double max_weight) {
  const auto follow = [&](auto arithmetic) {
    const auto rows = pace_rows<decltype(arithmetic)>(max_prob, target_prob, prediction, target, every);
    follow_rows(*pace_of(numbers), rows, {q_end, max_weight});
  };
  max_prob.scalar_type() == ScalarType::Double ? follow(double{}) : follow(float{});
}

void keep_pace_cpu(
    Tensor numbers, double bound, double q_start, double opening, double q_end, double max_weight) {
  Pace& pace = *pace_of(numbers);
  pace.bound = static_cast<float>(bound);
  pace.q_start = static_cast<float>(q_start);
  pace.opening = static_cast<float>(opening);
  keep_pace(pace, {q_end, max_weight});
}

}  // namespace
}  // namespace dal

STABLE_TORCH_LIBRARY_FRAGMENT(dal_kernels, m) {
  m.def("see_cpu(" DAL_SEE_ARGUMENTS ") -> ()");
  m.def("keep_pace_cpu(" DAL_KEEP_PACE_ARGUMENTS ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dal_kernels, CPU, m) {
  m.impl("see_cpu", TORCH_BOX(&dal::see_cpu));
  m.impl("keep_pace_cpu", TORCH_BOX(&dal::keep_pace_cpu));
}
