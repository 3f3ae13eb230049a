// What an operation needs of PyTorch: its tensors and threads, by the stable interface, whose headers compile in a
// second and whose libraries work with later releases.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <thread>
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

// PyTorch's threads, started once for a whole operation: while the caller computes one part after the other, the others
// wait for its parallel loops and take pieces of them. A piece is whoever's comes first, and nobody waits for a thread
// that has none, so that it does not matter how many threads there really are.
class Team {
 public:
  // The team that this thread leads, or null.
  static Team*& led() {
    static thread_local Team* team = nullptr;
    return team;
  }
  // Run work() on this thread, with a team unless it has one or PyTorch has one thread.
  template <typename Work>
  static void lead(const Work& work) {
    const int64_t threads = torch::stable::get_num_threads();
    if (threads == 1 || led()) return work();
    Team team(threads);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t past) {
      for (int64_t i = first; i < past; ++i) i == 0 ? team.begin(work) : team.help();
    });
    if (team.error_) std::rethrow_exception(team.error_);
  }
  int64_t threads() const { return threads_; }
  // Run work(piece) for 0 to n - 1 and return when all are done.
  template <typename Work>
  void run(int64_t n, const Work& work) {
    call_ = [](const void* given, int64_t piece) { (*static_cast<const Work*>(given))(piece); };
    work_ = &work;
    pieces_ = n;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store((++generation_ << 32) | uint64_t(n), std::memory_order_release);
    while (take()) {}
    for (int64_t waited = 0; done_.load(std::memory_order_acquire) < n; ++waited) rest(waited);
    if (error_) std::rethrow_exception(error_);
  }

 private:
  explicit Team(int64_t threads) : threads_(threads) {}
  template <typename Work>
  void begin(const Work& work) {
    led() = this;
    try {
      work();
    } catch (...) {
      fails();
    }
    led() = nullptr;
    over_.store(true, std::memory_order_release);
  }
  void help() {
    for (int64_t waited = 0; !over_.load(std::memory_order_acquire); waited = take() ? 0 : waited + 1) rest(waited);
  }
  // Take a piece of the loop and compute it; return whether there was one. The ticket's lower half counts pieces that
  // nobody has taken; its upper half is the number of the loop, whose end waits for those that were taken.
  bool take() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
      if (!(ticket & 0xffffffffu)) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel));
    try {
      call_(work_, pieces_ - int64_t(ticket & 0xffffffffu));
    } catch (...) {
      fails();
    }
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }
  void fails() {
    const std::lock_guard<std::mutex> one(mutex_);
    if (!error_) error_ = std::current_exception();
  }
  static void rest(int64_t waited) {
    if (waited > 4000) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  const int64_t threads_;
  uint64_t generation_ = 0;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* work_ = nullptr;
  int64_t pieces_ = 0;
  std::exception_ptr error_;
  std::mutex mutex_;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> over_{false};
};

inline int64_t threads() { return Team::led() ? Team::led()->threads() : torch::stable::get_num_threads(); }

// Run work(first, past) on the team's or PyTorch's threads over parts of 0 to n - 1, of at least `grain` each.
template <typename Work>
void parallel(int64_t n, int64_t grain, const Work& work) {
  if (n <= grain || threads() == 1) return work(0, n);
  Team* team = Team::led();
  if (!team) return torch::stable::parallel_for(0, n, grain, work);
  const int64_t pieces = std::min(team->threads(), (n + grain - 1) / grain), size = (n + pieces - 1) / pieces;
  team->run((n + size - 1) / size, [&](int64_t i) { work(i * size, std::min(n, (i + 1) * size)); });
}

// Run `work(task, next)` for each task on PyTorch's threads; a thread takes the next task when one is done, which is
// about `next`, null for the last ones.
template <typename Task, typename Work>
void share(const std::vector<Task>& tasks, const Work& work) {
  std::atomic<size_t> next{0};
  const size_t some = std::min<size_t>(threads(), tasks.size());
  parallel(some, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++)
      work(tasks[i], i + some < tasks.size() ? &tasks[i + some] : nullptr);
  });
}

}  // namespace moelab
