// The operators that keep the pace of DAL, on CPU tensors.
#include "../tensors.h"

namespace dal {
namespace {

template <class A>
Learnt learnt_from(const PaceRows<A>& rows) {
  // Four sums, because each addition to one of them waits for the last.
  Learnt part[4];
  int turn = 0;
  for (std::int64_t row = 0; row < rows.count; row += rows.every) part[turn++ % 4].add(rows, row);
  for (int i = 1; i < 4; ++i) part[0].add(part[i]);
  return part[0];
}

void see_cpu(
    Tensor numbers, Tensor max_prob, Tensor target_prob, Tensor prediction, Tensor target, std::int64_t every,
    double q_end, double max_weight) {
  Pace& pace = *pace_of(numbers);
  const auto follow_rows = [&](auto arithmetic) {
    follow(pace, learnt_from(pace_rows<decltype(arithmetic)>(max_prob, target_prob, prediction, target, every)));
  };
  max_prob.scalar_type() == ScalarType::Double ? follow_rows(double{}) : follow_rows(float{});
  keep_pace(pace, {q_end, max_weight});
}

void keep_pace_cpu(Tensor numbers, double bound, double opening, double q_end, double max_weight) {
  Pace& pace = *pace_of(numbers);
  pace.bound = static_cast<float>(bound);
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
