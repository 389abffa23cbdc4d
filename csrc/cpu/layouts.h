// Logits as the CPU operators take them, (N, C) or (N, C, S): which kernel reads them, and where.
#pragma once

#include <optional>

#include "batch.h"
#include "../tensors.h"

namespace dal {

// Of more classes that lie apart a tile of rows would leave every cache, and its sums in float would round too often.
constexpr std::int64_t kMostApart = 1 << 14;

// Rows are numbered n * S + s. The kernel whose lanes are rows reads them in place, whatever their strides. The other one
// reads rows whose classes are neighbours; there those that lie differently are copied, as doubles may.
template <class S>
class GivenRows {
 public:
  explicit GivenRows(const Tensor& given) : given_(given), rows_(given) {
    const std::int64_t dims = given.dim();
    require((dims == 2 || dims == 3) && given.size(1) > 0, "logits must be (N, C) or (N, C, S) with C >= 1");
    const std::int64_t classes = given.size(1), inner = dims == 3 ? given.size(2) : given.size(0);
    const std::int64_t class_stride = classes == 1 ? 1 : given.stride(1);
    const RowKernel<S>& kernel = kernel_of<S>(row_kernels());
    if (kernel.lane_rows && classes <= (class_stride == 1 ? kernel.lane_classes : kMostApart)) {
      rows_are_apart_ = dims == 3 && class_stride != 1;
      Layout own = {inner, dims == 3 ? given.stride(0) : 0, given.stride(dims == 3 ? 2 : 0), class_stride};
      // As one image, because to find the image of a row takes longer than much of what is made of it.
      if (own.outer_stride == inner * own.inner_stride) own.inner = given.size(0) * inner;
      layouts_ = Layouts{own, rows_are_apart_ ? Layout{inner, classes * inner, 1, inner} : Layout{0, 0, 0, 1}};
    } else {
      if (dims == 3) rows_ = torch::stable::reshape(torch::stable::transpose(given, 1, 2), {-1, classes});
      rows_ = with_unit_class_stride(rows_);
    }
  }

  Logits<S> logits() const {
    const std::int64_t count = given_.size(0) * (given_.dim() == 3 ? given_.size(2) : 1);
    return {static_cast<const S*>(rows_.const_data_ptr()), count, given_.size(1), rows_.stride(0)};
  }
  // Null where the other kernel reads them.
  const Layouts* lanes() const { return layouts_ ? &*layouts_ : nullptr; }

  // Of the shape of the logits, and with classes apart where theirs are.
  Tensor empty_gradient() const { return empty_gradient_of(given_, rows_are_apart_); }

 private:
  Tensor given_, rows_;
  std::optional<Layouts> layouts_;
  bool rows_are_apart_ = false;
};

}  // namespace dal
