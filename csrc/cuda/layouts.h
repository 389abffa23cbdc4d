// Logits as the CUDA operators take them, (N, C) or (N, C, S): which kernels read them, and where.
#pragma once

#include "../tensors.h"
#include "plan.h"

namespace dal {

// Of more classes that lie apart the warps of a block do not keep a row.
constexpr std::int64_t kMostApart = kMostApartValues * kMostShares;

// Rows are numbered n * S + s. Where their classes lie apart, lanes lie over the rows, and the gradient has that layout
// too. Otherwise rows lie one after the other, and what does not lie so is copied, as doubles may be.
class GivenRows {
 public:
  explicit GivenRows(const Tensor& given) : given_(given), rows_(given) {
    const std::int64_t dims = given.dim();
    require((dims == 2 || dims == 3) && given.size(1) > 0, "logits must be (N, C) or (N, C, S) with C >= 1");
    const std::int64_t classes = given.size(1);
    is_apart_ = dims == 3 && 1 < classes && classes <= kMostApart && given.stride(1) != 1 &&
                given.scalar_type() != ScalarType::Double;
    if (is_apart_) {
      const std::int64_t inner = given.size(2);
      layouts_ = {{inner, given.stride(0), given.stride(2), given.stride(1)}, {inner, classes * inner, 1, inner}};
    } else {
      if (dims == 3) rows_ = torch::stable::reshape(torch::stable::transpose(given, 1, 2), {-1, classes});
      rows_ = with_unit_class_stride(rows_);
      const Layout packed = {rows_.size(0), 0, classes, 1};
      layouts_ = {packed, packed};
    }
  }

  // What kernels read: (N, C), or where classes lie apart what was given.
  const Tensor& tensor() const { return rows_; }
  bool is_apart() const { return is_apart_; }
  const Layouts& layouts() const { return layouts_; }
  template <class S> Logits<S> logits() const {
    const std::int64_t rows = is_apart_ ? rows_.size(0) * rows_.size(2) : rows_.size(0);
    return {static_cast<const S*>(rows_.const_data_ptr()), rows, rows_.size(1), rows_.stride(0)};
  }

  // Of the shape of the logits, and with classes apart where theirs are.
  Tensor empty_gradient() const { return empty_gradient_of(given_, is_apart_); }
  // Whether a gradient lies as empty_gradient makes it.
  bool lies_as_made(const Tensor& gradient) const {
    if (gradient.dim() != given_.dim() || dtype_of(gradient) != dtype_of(given_)) return false;
    for (std::int64_t i = 0; i < gradient.dim(); ++i)
      if (gradient.size(i) != given_.size(i)) return false;
    if (given_.dim() == 2 || is_apart_) return gradient.is_contiguous();
    return torch::stable::transpose(gradient, 1, 2).is_contiguous();
  }

 private:
  Tensor given_, rows_;
  Layouts layouts_;
  bool is_apart_;
};

// Whether a gradient has no gaps, in one of the orders that GivenRows makes.
inline bool fills_its_memory(const Tensor& gradient) {
  return gradient.is_contiguous() || (gradient.dim() == 3 && torch::stable::transpose(gradient, 1, 2).is_contiguous());
}

}  // namespace dal
