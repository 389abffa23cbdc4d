// Tensors of the LibTorch stable ABI -> the plain pointers that row kernels are given, and the checks on the way.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>

#include "batch.h"
#include "pace.h"

namespace dal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Place {
  std::int32_t type, index;
  static Place of(const Tensor& tensor) {
    Place place{};
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &place.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &place.index));
    return place;
  }
};

template <std::size_t D>
Tensor empty(const std::array<std::int64_t, D>& sizes, std::int32_t dtype, Place place) {
  std::array<std::int64_t, D> strides{};
  std::int64_t stride = 1;
  for (std::size_t i = D; i-- > 0; stride *= std::max<std::int64_t>(1, sizes[i])) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      D, sizes.data(), strides.data(), dtype, place.type, place.index, &handle));
  return Tensor(handle);
}

template <class A>
std::int32_t dtype_code() {
  return std::is_same_v<A, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline std::int32_t dtype_of(const Tensor& tensor) {
  std::int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// Rows are read in place where neighbouring classes are neighbours in memory; any other layout is copied.
inline Tensor with_unit_class_stride(const Tensor& logits) {
  require(logits.dim() == 2 && logits.size(1) > 0, "logits must be (N, C) with C >= 1");
  return logits.stride(1) == 1 || logits.size(1) == 1 ? logits : torch::stable::contiguous(logits);
}

// A gradient of the shape of logits (N, C) or (N, C, S); its classes lie apart, as S does not, or are neighbours.
inline Tensor empty_gradient_of(const Tensor& logits, bool apart) {
  const std::int64_t n = logits.size(0), classes = logits.size(1);
  const Place place = Place::of(logits);
  if (logits.dim() == 2) return empty<2>({n, classes}, dtype_of(logits), place);
  const std::int64_t inner = logits.size(2);
  if (apart) return empty<3>({n, classes, inner}, dtype_of(logits), place);
  return torch::stable::transpose(empty<3>({n, inner, classes}, dtype_of(logits), place), 1, 2);
}

template <class S>
Logits<S> logits_of(const Tensor& logits) {
  return {static_cast<const S*>(logits.const_data_ptr()), logits.size(0), logits.size(1), logits.stride(0)};
}

inline Target target_of(const Tensor& target, std::int64_t rows, std::int64_t ignore_index) {
  require(target.dim() == 1 && target.size(0) == rows && target.scalar_type() == ScalarType::Long,
          "target must be (N,) int64");
  return {static_cast<const std::int64_t*>(target.const_data_ptr()), target.stride(0), ignore_index};
}

inline std::int64_t row_stride(const Tensor& values, std::int64_t rows, const char* message) {
  const bool one = values.dim() == 0;
  require(one || (values.dim() == 1 && values.size(0) == rows), message);
  return one ? 0 : values.stride(0);
}

// How many knobs a loss has.
inline int knob_count(std::int64_t objective) {
  switch (objective) {
    case kFisherRao: case kBrier: return 0;
    case kDynamicsAware: case kDynamicsAwareHard: case kSymmetricCrossEntropy:
    case kAsymmetricGeneralizedCrossEntropy: case kAsymmetricUnhinged: case kNormalizedAndAbsolute: return 2;
    case kJointAsymmetric: case kEpsilonSoftmax: return 3;
    case kNormalizedAndAsymmetric: return 4;
    default: return 1;
  }
}

inline Knobs knobs_of(const Tensor& knobs, std::int64_t rows, std::int64_t objective) {
  require(0 <= objective && objective < kObjectives, "objective must be the number of a loss");
  const bool is_double = knobs.scalar_type() == ScalarType::Double;
  const int count = knob_count(objective);
  require(is_double || knobs.scalar_type() == ScalarType::Float, "knobs must be float32 or float64");
  const bool one = knobs.dim() == 1;
  require((one || (knobs.dim() == 2 && knobs.size(0) == rows)) && knobs.size(knobs.dim() - 1) == count &&
              (count < 2 || knobs.stride(knobs.dim() - 1) == 1),
          "knobs must be (K,) or (N, K) with the K knobs of the loss side by side");
  return {knobs.const_data_ptr(), is_double, count, one ? 0 : knobs.stride(0)};
}

// f(storage) with the storage type of a dtype.
template <class F>
auto dispatch(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Float16{});
    default:
      require(logits.scalar_type() == ScalarType::Float, "logits must be float32, float64, bfloat16 or float16");
      return f(float{});
  }
}

// What a forward reads. What it writes is the caller's to add.
template <class S>
ForwardBatch<S> forward_batch(
    const Logits<S>& logits, const Tensor& target, const Tensor& knobs, const std::optional<Tensor>& weight,
    std::int64_t objective, std::int64_t ignore_index, std::int64_t reduction) {
  using A = Arithmetic<S>;
  ForwardBatch<S> batch{};
  batch.logits = logits;
  batch.target = target_of(target, logits.rows, ignore_index);
  batch.knobs = knobs_of(knobs, logits.rows, objective);
  batch.objective = objective;
  batch.log_classes = static_cast<A>(std::log(static_cast<double>(batch.logits.classes)));
  if (weight) {
    require(dtype_of(*weight) == dtype_code<A>() && weight->dim() == 1 && weight->size(0) == batch.logits.classes,
            "weight must be (C,) in the dtype of the loss");
    batch.weight = static_cast<const A*>(weight->const_data_ptr());
    batch.weight_stride = weight->stride(0);
  }
  require(reduction == kNone || reduction == kMean || reduction == kSum, "reduction must be 0, 1 or 2");
  return batch;
}

// What a backward reads and writes.
template <class S>
BackwardBatch<S> backward_batch(
    const Logits<S>& in, const Tensor& target, const Tensor& fields, const Tensor& prediction, const Tensor& upstream,
    std::int64_t ignore_index, const Tensor& gradient) {
  using A = Arithmetic<S>;
  require(dtype_of(upstream) == dtype_code<A>() && dtype_of(fields) == dtype_code<A>(),
          "upstream must be 0-d or one value a row; it and fields must be in the dtype of the loss");
  require(prediction.scalar_type() == ScalarType::Long && prediction.dim() == 1 && prediction.is_contiguous() &&
              (prediction.size(0) == 0 || prediction.size(0) == in.rows),
          "prediction must be a contiguous (N,) int64 or empty");
  require(fields.dim() == 2 && fields.size(0) >= kGradientFields + (prediction.numel() ? 1 : 0) &&
              fields.size(1) == in.rows && fields.is_contiguous(),
          "fields must be contiguous, (5, N) or longer, (4, N) without prediction");
  require(fields.size(0) <= kNarrowFields || fields.size(0) == kFields, "fields must be at most (8, N), or (10, N)");
  return {
      in,
      target_of(target, in.rows, ignore_index),
      static_cast<const A*>(fields.const_data_ptr()),
      prediction.numel() ? static_cast<const std::int64_t*>(prediction.const_data_ptr()) : nullptr,
      fields.size(0) == kFields,
      static_cast<const A*>(upstream.const_data_ptr()),
      row_stride(upstream, in.rows, "upstream must be 0-d or one value a row"),
      static_cast<S*>(gradient.mutable_data_ptr())};
}

inline Pace* pace_of(const Tensor& numbers) {
  require(dtype_of(numbers) == aoti_torch_dtype_float32() && numbers.dim() == 1 &&
              numbers.numel() * sizeof(float) == sizeof(Pace) && numbers.is_contiguous(),
          "numbers must be (6,) contiguous float32");
  return static_cast<Pace*>(numbers.mutable_data_ptr());
}

// What a training call says of its rows, contiguous in any shape, all of one.
template <class A>
PaceRows<A> pace_rows(
    const Tensor& max_prob, const Tensor& target_prob, const Tensor& prediction, const Tensor& target,
    std::int64_t every) {
  const std::int64_t count = max_prob.numel();
  for (const Tensor& values : {max_prob, target_prob, prediction, target})
    require(values.numel() == count && values.is_contiguous(), "statistics and target must be contiguous, of N rows");
  require(dtype_of(max_prob) == dtype_code<A>() && dtype_of(target_prob) == dtype_code<A>(),
          "max_prob and target_prob must be float32 or float64, and both the same");
  require(prediction.scalar_type() == ScalarType::Long && target.scalar_type() == ScalarType::Long,
          "prediction and target must be int64");
  require(every >= 1, "every must be at least 1");
  return {
      static_cast<const A*>(max_prob.const_data_ptr()), static_cast<const A*>(target_prob.const_data_ptr()),
      static_cast<const std::int64_t*>(prediction.const_data_ptr()),
      static_cast<const std::int64_t*>(target.const_data_ptr()), count, every};
}

// Of a call with all its fields and the prediction.
template <class S>
PaceRows<Arithmetic<S>> pace_rows(const ForwardBatch<S>& batch, std::int64_t every) {
  const std::int64_t count = batch.logits.rows;
  require(batch.target.stride == 1 || count < 2, "target must be contiguous where a pace follows the call");
  require(every >= 1, "every must be at least 1");
  return {
      batch.fields + kMaxProb * count, batch.fields + kTargetProb * count, batch.prediction, batch.target.data, count,
      every};
}

// The pace that follows a call, as an operator is given it.
struct PaceGiven {
  Tensor numbers;
  std::int64_t every;
  PaceLimits limits;
};

}  // namespace dal

#define DAL_SEE_ARGUMENTS                                                                                 \
  "Tensor(a!) numbers, Tensor max_prob, Tensor target_prob, Tensor prediction, Tensor target, int every, " \
  "float q_end, float max_weight"
#define DAL_KEEP_PACE_ARGUMENTS \
  "Tensor(a!) numbers, float bound, float q_start, float opening, float q_end, float max_weight"
#define DAL_LOSS_ARGUMENTS                                                                              \
  "Tensor logits, Tensor target, Tensor knobs, Tensor? weight, int objective, int ignore_index, "      \
  "int reduction, bool want_gradient"
#define DAL_LOSS_AND_PACE_ARGUMENTS \
  DAL_LOSS_ARGUMENTS ", Tensor(a!) numbers, int every, float q_end, float max_weight"
#define DAL_GRADIENT_REST "Tensor target, Tensor fields, Tensor prediction, Tensor upstream, int ignore_index"
#define DAL_GRADIENT_ARGUMENTS "Tensor logits, " DAL_GRADIENT_REST
#define DAL_OVERWRITE_ARGUMENTS "Tensor(a!) logits, " DAL_GRADIENT_REST
