// What an operation needs of PyTorch: its tensors and threads, by the stable interface, whose headers compile in a
// second and whose libraries work with later releases.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "vectors.h"

// Each instruction set has a namespace of operations of its own, so that tests can hold several in one process.
#ifndef MOELAB_OPERATIONS
#define MOELAB_OPERATIONS moelab
#endif

namespace moelab {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Raise an error with a text of these parts unless `fine`.
template <typename... Parts>
inline void check(bool fine, const Parts&... parts) {
  if (fine) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

using torch::headeronly::ScalarType;
inline bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }
inline bool is_int(const Tensor& t) { return t.scalar_type() == ScalarType::Int; }

// Whether x is float or bfloat16, and the others, as far as they are there, of the same type.
template <typename... Others>
bool same_dtype(const Tensor& x, const Others&... others) {
  const auto type = x.scalar_type();
  const auto same = [&](const Optional& t) { return !t.has_value() || t->scalar_type() == type; };
  return (type == ScalarType::Float || type == ScalarType::BFloat16) && (... && same(others));
}
// Whether the tensors, as far as they are there, are contiguous.
template <typename... Tensors>
bool contiguous(const Tensors&... tensors) {
  const auto one = [](const Optional& t) { return !t.has_value() || t->is_contiguous(); };
  return (... && one(tensors));
}

// The memory of a contiguous tensor, null for none.
template <typename T>
inline T* data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }
template <typename T>
inline T* data(const Optional& t) { return t.has_value() ? data<T>(*t) : nullptr; }

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// A new contiguous tensor on the CPU.
inline Tensor empty(int32_t dtype, const int64_t* sizes, int64_t dims) {
  std::array<int64_t, 8> strides{1};
  check(dims <= int64_t(strides.size()), "tensors have at most ", strides.size(), " dims");
  for (int64_t i = dims - 1, step = 1; i >= 0; --i) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle made;  // the interface's own new_empty takes five times as long
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}
inline Tensor empty(int32_t dtype, std::initializer_list<int64_t> sizes) {
  return empty(dtype, sizes.begin(), sizes.size());
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) { return empty(dtype_of(like), sizes); }
// The same with x's sizes, the last one `n`.
inline Tensor empty_rows(const Tensor& x, int64_t n) {
  std::array<int64_t, 8> sizes;
  const int64_t dims = x.dim();
  check(0 < dims && dims <= int64_t(sizes.size()), "tensors have 1 to ", sizes.size(), " dims");
  std::copy_n(x.sizes().data(), dims, sizes.data());
  sizes[dims - 1] = n;
  return empty(dtype_of(x), sizes.data(), dims);
}
inline Tensor ints(std::initializer_list<int64_t> sizes) { return empty(aoti_torch_dtype_int32(), sizes); }
inline Tensor floats(std::initializer_list<int64_t> sizes) { return empty(aoti_torch_dtype_float32(), sizes); }

// Run work(first, past) on PyTorch's threads over parts of 0 to n - 1, of at least `grain` each.
template <typename Work>
void parallel(int64_t n, int64_t grain, const Work& work) {
  if (n <= grain || torch::stable::get_num_threads() == 1)
    work(0, n);
  else
    torch::stable::parallel_for(0, n, grain, work);
}

// Run `work(task, next)` for each task on PyTorch's threads; a thread takes the next task when one is done, which is
// about `next`, null for the last ones.
template <typename Task, typename Work>
void share(const std::vector<Task>& tasks, const Work& work) {
  std::atomic<size_t> next{0};
  const size_t threads = std::min<size_t>(torch::stable::get_num_threads(), tasks.size());
  parallel(threads, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++)
      work(tasks[i], i + threads < tasks.size() ? &tasks[i + threads] : nullptr);
  });
}

}  // namespace moelab
