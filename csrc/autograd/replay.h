// Operators of the Triton backend without Python: the kernels that Triton compiled for arguments of a kind, launched
// again for others of that kind. dal_kernels/backends/triton/record.py writes them down, and says why that suffices.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <memory>
#include <unordered_map>

#include "plain.h"
#include "tables.h"

namespace dal {

// What a parameter of a kernel is: a number as its bits, or the address of an argument or of a buffer, by its place, and
// how many bytes behind that.
struct Parameter {
  enum What { kBits, kArgument, kBuffer } what;
  std::uint64_t value, offset;
};

struct Launch {
  void* function;
  unsigned grid[3], threads, shared;
  std::vector<Parameter> parameters;
};

struct Record {
  std::vector<std::pair<std::vector<std::int64_t>, at::ScalarType>> buffers;
  std::vector<std::size_t> results;  // places among the buffers
  std::vector<Launch> launches;
  std::vector<py::object> owned;  // what must live as long as the kernels may be launched

  Record() = default;
  Record(const Record&) = delete;
  // Maybe by a thread that has launched and let go of the interpreter, while another one forgot the record.
  ~Record() {
    const py::gil_scoped_acquire gil;
    owned.clear();
  }
};

// All that a record depends on, as numbers: the operator, the stream, and of each argument its layout or its value.
using Kind = std::vector<std::int64_t>;
struct KindHash {
  std::size_t operator()(const Kind& kind) const {
    std::uint64_t hash = kind.size();
    for (const std::int64_t number : kind) hash = (hash ^ static_cast<std::uint64_t>(number)) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
  }
};

// A null record: such arguments are Python's.
using Records = std::unordered_map<Kind, std::shared_ptr<const Record>, KindHash>;
struct AllRecords {
  std::mutex mutex;  // forward and backward are different threads
  Records known;
};
inline AllRecords& all_records() {
  static auto* made = new AllRecords;
  return *made;
}
constexpr std::size_t kRecords = 4096;
// Not under the lock, because what records own may run Python when it goes, for which another thread may hold the lock.
inline void forget_records() {
  Records gone;
  auto& [mutex, known] = all_records();
  const std::lock_guard lock(mutex);
  gone.swap(known);
}

inline Kind kind_of(const Operator& op, const Values& values, void* stream) {
  Kind kind{op.id, reinterpret_cast<std::int64_t>(stream)};
  kind.reserve(64);
  for (const c10::IValue& value : values) {
    if (value.isTensor()) {
      const Tensor& tensor = value.toTensor();
      // Triton compiles for addresses that are multiples of 16, or not.
      const auto address = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
      const std::int64_t traits[] = {
          1, static_cast<std::int64_t>(tensor.scalar_type()), tensor.device().index(), address % 16 == 0, tensor.dim()};
      kind.insert(kind.end(), std::begin(traits), std::end(traits));
      kind.insert(kind.end(), tensor.sizes().begin(), tensor.sizes().end());
      kind.insert(kind.end(), tensor.strides().begin(), tensor.strides().end());
    } else if (value.isDouble()) {
      kind.push_back(2);
      kind.push_back(c10::bit_cast<std::int64_t>(value.toDouble()));
    } else if (value.isNone()) {
      kind.push_back(3);
    } else {
      kind.push_back(4);
      kind.push_back(value.isBool() ? value.toBool() : value.toInt());
    }
  }
  return kind;
}

// The signature of cuLaunchKernel.
using LaunchKernel = int (*)(
    void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared, void* stream,
    void** parameters, void** extra);

// CU_STREAM_PER_THREAD.
constexpr std::uintptr_t kPerThread = 2;
// What the driver answers in a thread that has not made a context current yet, as Triton does before it launches.
constexpr int kNoContext = 201;

inline std::optional<Values> replayed(
    const Operator& op, const Record& record, const Values& values, void* stream) {
  // For a profiler, which the dispatcher would tell of the operator.
  RECORD_FUNCTION(op.full_name, c10::ArrayRef<const c10::IValue>(values.data(), values.size()));
  const auto launch = reinterpret_cast<LaunchKernel>(tables().launcher);
  const at::TensorOptions on = at::TensorOptions().device(values[0].toTensor().device());
  std::vector<Tensor> buffers;
  buffers.reserve(record.buffers.size());
  for (const auto& [sizes, dtype] : record.buffers) {
    buffers.push_back(at::empty(sizes, on.dtype(dtype)));
    // As torch's own allocators have it, and as the kernels were compiled for.
    if (reinterpret_cast<std::uintptr_t>(buffers.back().const_data_ptr()) % 16 != 0) return std::nullopt;
  }
  std::vector<std::uint64_t> bits;
  std::vector<void*> addresses;
  for (const Launch& each : record.launches) {
    bits.clear();
    for (const auto [what, value, offset] : each.parameters) {
      const Tensor* tensor = what == Parameter::kArgument ? &values[value].toTensor()
                             : what == Parameter::kBuffer ? &buffers[value]
                                                          : nullptr;
      bits.push_back(tensor ? reinterpret_cast<std::uintptr_t>(tensor->const_data_ptr()) + offset : value);
    }
    // Kernels have two parameters more, for memory that Triton would have allocated had they asked for any.
    bits.insert(bits.end(), 2, 0);
    addresses.clear();
    for (std::uint64_t& value : bits) addresses.push_back(&value);
    const int status = launch(
        each.function, each.grid[0], each.grid[1], each.grid[2], each.threads, 1, 1, each.shared, stream,
        addresses.data(), nullptr);
    if (status == kNoContext && &each == &record.launches.front()) return std::nullopt;
    TORCH_CHECK(status == 0, "the CUDA driver could not launch a kernel of Triton's: error ", status);
  }
  Values results;
  for (const std::size_t place : record.results) results.emplace_back(std::move(buffers[place]));
  return results;
}

inline std::shared_ptr<const Record> record_of(const py::handle given) {
  if (given.is_none()) return nullptr;
  const auto [buffers, results, launches] = given.cast<std::tuple<py::list, std::vector<std::size_t>, py::list>>();
  auto made = std::make_shared<Record>();
  made->results = results;
  for (const py::handle buffer : buffers)
    made->buffers.push_back(buffer.cast<std::pair<std::vector<std::int64_t>, at::ScalarType>>());
  for (const py::handle launch : launches) {
    const auto [owned, function, grid, threads, shared, parameters] = launch.cast<std::tuple<
        py::object, std::uintptr_t, std::array<unsigned, 3>, unsigned, unsigned,
        std::vector<std::tuple<int, std::uint64_t, std::uint64_t>>>>();
    made->owned.push_back(owned);
    Launch& added = made->launches.emplace_back();
    added.function = reinterpret_cast<void*>(function);
    std::copy(grid.begin(), grid.end(), added.grid);
    added.threads = threads;
    added.shared = shared;
    for (const auto& [what, value, offset] : parameters)
      added.parameters.push_back({static_cast<Parameter::What>(what), value, offset});
  }
  return made;
}

// Runs an operator in Python, and remembers how to do without it.
inline Values recorded(const Operator& op, Kind kind, const Values& values) {
  py::tuple arguments(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    const c10::IValue& value = values[i];
    arguments[i] = value.isTensor()   ? py::cast(value.toTensor())
                   : value.isDouble() ? py::cast(value.toDouble())
                   : value.isBool()   ? py::cast(value.toBool())
                   : value.isInt()    ? py::cast(value.toInt())
                                      : py::none().cast<py::object>();
  }
  const auto [results, record] =
      tables().record(op.name, *arguments).cast<std::pair<std::vector<Tensor>, py::object>>();
  const std::shared_ptr<const Record> made = record_of(record);
  auto& [mutex, known] = all_records();
  if (known.size() >= kRecords) forget_records();
  {
    const std::lock_guard lock(mutex);
    known[std::move(kind)] = made;
  }
  return Values(results.begin(), results.end());
}

// Whether a kind of call has been seen, and how it is done again.
inline std::pair<bool, std::shared_ptr<const Record>> known_record(const Kind& kind) {
  auto& [mutex, known] = all_records();
  const std::lock_guard lock(mutex);
  const auto at = known.find(kind);
  return at == known.end() ? std::pair(false, nullptr) : std::pair(true, at->second);
}

// Calls an operator of Triton's past the dispatcher, or leaves it there.
inline std::optional<Values> past_the_dispatcher(const Operator& op, const Values& values) {
  const auto plain = [](const c10::IValue& value) { return !value.isTensor() || is_plain(value.toTensor()); };
  if (!op.in_python || !tables().launcher || is_watched() || !std::all_of(values.begin(), values.end(), plain))
    return std::nullopt;
  const Tensor& first = values[0].toTensor();
  const c10::DeviceGuard guard(first.device());
  void* const stream = stream_of(first);
  // The handle of a thread's own stream is another stream in each thread, and what a record owns is one stream's.
  if (stream == reinterpret_cast<void*>(kPerThread)) return std::nullopt;
  Kind kind = kind_of(op, values, stream);
  const auto [found, record] = known_record(kind);
  if (found && !record) return std::nullopt;
  const py::gil_scoped_acquire gil;
  if (!tables().undisturbed().cast<bool>()) return std::nullopt;
  if (!found) return recorded(op, std::move(kind), values);
  const py::gil_scoped_release released;
  return replayed(op, *record, values, stream);
}

inline Values called(const Operator& op, Values values) {
  if (std::optional<Values> results = past_the_dispatcher(op, values)) return *std::move(results);
  op.handle.callBoxed(values);
  return values;
}

}  // namespace dal
