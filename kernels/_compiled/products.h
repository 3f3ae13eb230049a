// Products of small matrices by oneDNN's micro-kernel (at::native::cpublas::brgemm), and the layouts that they need.
//
// The micro-kernel multiplies row-major A [m, k] by B [k, n] into float32 C [m, n]. Its code is generated once for each
// combination of sizes and kept, so row counts are rounded up (row_step). B lies in panels of 64 columns:
//
//   float     panel [k][64], or the matrix itself, seen as panels with a common row stride;
//   bfloat16  panel [k/2][64][2]: two rows side by side ("VNNI"), as the processor's instructions read them.
//
// So bfloat16 rows move in pairs of 32 bits, and one transposition of 32-bit words serves both types.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "vectors.h"

namespace moelab {

constexpr int64_t kPanel = 64;    // columns of a panel: four registers of the micro-kernel
constexpr int64_t kWide = 256;    // columns of one product where B lies row-major
constexpr int64_t kInner = 512;   // inner length of one product: a panel of it stays in a core's second-level cache

template <typename T>
constexpr int64_t row_step() { return sizeof(T) == 2 ? 16 : 8; }

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Write the transposed [columns, rows] of 32-bit words [rows, columns].
inline void transpose(const float* in, int64_t ld_in, float* out, int64_t ld_out, int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t m = std::min(kLanes, rows - r), n = std::min(kLanes, columns - c);
      if (m == kLanes && n == kLanes)
        at::vec::transpose_mxn<float, 16, 16>(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out);
      else
        at::vec::transpose_mxn<float>(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out, m, n);
    }
}

// Write pairs of rows as 32-bit words [rows / 2, columns]; the rows are even in number, the columns a multiple of 16.
template <typename From>
void interleave(const From* in, int64_t ld_in, uint32_t* out, int64_t ld_out, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < columns; c += kLanes) {
      const auto first = load_words(in + r * ld_in + c), second = load_words(in + (r + 1) * ld_in + c);
      _mm512_storeu_si512(out + r / 2 * ld_out + c, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
}

// One thread's memory for a call, kept for the next one.
class Scratch {
 public:
  static Scratch& of_thread() {
    static thread_local Scratch scratch;
    scratch.used_ = 0;
    return scratch;
  }
  // Make room for `bytes` in all; earlier memory is gone.
  void reserve(int64_t bytes) {
    bytes += 64 * 16;  // for the alignment of up to 16 pieces
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 4096))));
      TORCH_CHECK(memory_, "no memory for ", bytes, " bytes");
      size_ = round_up(bytes, 4096);
    }
  }
  template <typename T>
  T* take(int64_t n) {
    T* found = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += round_up(n * sizeof(T), 64);
    TORCH_INTERNAL_ASSERT(used_ <= size_);
    return found;
  }

 private:
  struct Free { void operator()(char* p) const { std::free(p); } };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0, used_ = 0;
};

// A matrix B [k, n] in panels.
template <typename T>
struct Panels {
  const T* data;
  int64_t stride;  // elements from panel to panel
  int64_t ld;      // columns from row to row
  // The same matrix from a row on, which is even.
  Panels from(int64_t row) const { return {data + row * ld, stride, ld}; }
};

template <typename T>
int64_t panel_elements(int64_t k, int64_t n) { return k * round_up(n, kPanel); }

// Return B [k, n], given row-major, in panels: float as it lies, bfloat16 packed into `to`.
template <typename From>
Panels<float> panels(const From* b, int64_t ld, int64_t, int64_t, float*) { return {b, kPanel, ld}; }
template <typename From>
Panels<BFloat16> panels(const From* b, int64_t ld, int64_t k, int64_t n, BFloat16* to) {
  for (int64_t c = 0; c < n; c += kPanel)
    interleave(b + c, ld, reinterpret_cast<uint32_t*>(to + c * k), kPanel, k, std::min(kPanel, n - c));
  return {to, k * kPanel, kPanel};
}

// Return B [k, n] in panels, of which the transposed [n, k] is given row-major; `row` has 16 * k elements of memory.
inline Panels<float> panels_of_transposed(
    const float* b, int64_t ld, int64_t k, int64_t n, float* to, float*) {
  for (int64_t c = 0; c < n; c += kPanel) transpose(b + c * ld, ld, to + c * k, kPanel, std::min(kPanel, n - c), k);
  return {to, k * kPanel, kPanel};
}
template <typename From>
Panels<BFloat16> panels_of_transposed(
    const From* b, int64_t ld, int64_t k, int64_t n, BFloat16* to, BFloat16* row) {
  for (int64_t c = 0; c < n; c += kLanes) {  // of 16 rows of the transposed, pairs of neighbours are 32-bit words
    for (int64_t i = 0; i < kLanes; ++i) copy(b + (c + i) * ld, row + i * k, k);
    float* there = reinterpret_cast<float*>(to + c / kPanel * kPanel * k) + c % kPanel;
    transpose(reinterpret_cast<const float*>(row), k / 2, there, kPanel, kLanes, k / 2);
  }
  return {to, k * kPanel, kPanel};
}

// Write A = x^T [columns, rows], row-major, of x [rows, columns]; `words` has rows / 2 * columns words of memory.
inline void transposed(const float* x, int64_t ld, float* to, int64_t rows, int64_t columns, uint32_t*) {
  transpose(x, ld, to, rows, rows, columns);
}
inline void transposed(const BFloat16* x, int64_t ld, BFloat16* to, int64_t rows, int64_t columns, uint32_t* words) {
  interleave(x, ld, words, columns, rows, columns);
  transpose(reinterpret_cast<const float*>(words), columns, reinterpret_cast<float*>(to), rows / 2, rows / 2, columns);
}

// C [m, n] = A [m, k] @ B, or with `add` C + A @ B.
template <typename T>
void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, Panels<T> b, float* c, int64_t ldc, bool add) {
  const int64_t step = b.stride == kPanel && b.ld > kPanel ? kWide : kPanel;
  for (int64_t j = 0; j < n; j += step)
    for (int64_t i = 0; i < k; i += kInner)
      at::native::cpublas::brgemm(
          m, std::min(step, n - j), std::min(kInner, k - i), lda, b.ld, ldc, add || i > 0, a + i,
          b.data + j / kPanel * b.stride + i * b.ld, c + j, sizeof(T) == 2);
}

// Run `work(task)` for each task on PyTorch's number of threads; a thread takes the next task when one is done.
template <typename Task, typename Work>
void share(const std::vector<Task>& tasks, const Work& work) {
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks.size());
  struct Release {
    ~Release() { at::native::cpublas::brgemm_release(); }  // gives back the processor's tiles
  };
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Release release;
    for (size_t i = next++; i < tasks.size(); i = next++) work(tasks[i]);
  });
}

}  // namespace moelab
