// Products of small matrices, and the layouts that they need.
//
// A product goes step by step through the inner dimension k. What a step takes of a row of A or of a column of B is a
// word: a float, or two bfloat16 values of neighbouring k. A block of the result is summed in registers, in the order
// of k and by the same instructions whatever its size, so that a result has the same bits in any division into blocks.
// B [k, n] lies in panels of 64 columns:
//
//   float     panel [k][64], or the matrix itself, seen as panels with a common row stride;
//   bfloat16  panel [k / 2][64][2]: two rows side by side ("VNNI"), as the processor's instructions read them.
//
// A may lie in either order. Meanwhile memory can fetch what is needed later (Ahead).
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "vectors.h"

namespace moelab {

constexpr int64_t kPanel = 64;    // columns of a panel: four vectors
constexpr int64_t kInner = 512;   // inner length of one product: a panel of it stays in a core's second-level cache

// Values in a word.
template <typename T>
constexpr int64_t kWord = 4 / sizeof(T);

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Write pairs of rows as words [rows / 2, columns], after the last of an odd number zeros; columns: a multiple of 16.
template <typename From>
void interleave(const From* in, int64_t ld_in, uint32_t* out, int64_t ld_out, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < columns; c += kLanes) {
      const From* second = r + 1 < rows ? in + (r + 1) * ld_in + c : nullptr;
      _mm512_storeu_si512(out + r / 2 * ld_out + c, side_by_side(load_narrow(in + r * ld_in + c, second)));
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

// The operand A: word k of row i is words[i * row + k * step].
struct Left {
  const uint32_t* words;
  int64_t row, step;
};

// Rows as they lie, `ld` values apart.
template <typename T>
Left rows(const T* x, int64_t ld) {
  return {reinterpret_cast<const uint32_t*>(x), ld / kWord<T>, 1};
}

// The transposed of x [n, columns]; `to` has room for words [n / 2 rounded up, columns], which bfloat16 needs.
inline Left transposed(const float* x, int64_t ld, int64_t, int64_t, uint32_t*) {
  return {reinterpret_cast<const uint32_t*>(x), 1, ld};
}
inline Left transposed(const BFloat16* x, int64_t ld, int64_t n, int64_t columns, uint32_t* to) {
  interleave(x, ld, to, columns, n, columns);
  return {to, 1, columns};
}

// The operand B in panels.
struct Panels {
  const uint32_t* words;
  int64_t stride;  // words from panel to panel
  int64_t ld;      // words from step to step
  // The same from a step on.
  Panels from(int64_t step) const { return {words + step * ld, stride, ld}; }
};

// Words of B [k, n] in panels.
template <typename T>
int64_t panel_words(int64_t k, int64_t n) { return (k + kWord<T> - 1) / kWord<T> * round_up(n, kPanel); }

// Return B [k, n] of T, given row-major, in panels: float as it lies, bfloat16 packed into `to`.
template <typename T, typename From>
Panels panels(const From* b, int64_t ld, int64_t k, int64_t n, uint32_t* to) {
  if constexpr (sizeof(T) == 4) {
    return {reinterpret_cast<const uint32_t*>(b), kPanel, ld};
  } else {
    const int64_t steps = (k + 1) / 2;
    for (int64_t c = 0; c < n; c += kPanel) interleave(b + c, ld, to + c * steps, kPanel, k, std::min(kPanel, n - c));
    return {to, steps * kPanel, kPanel};
  }
}

// Return B [k, n] of T in panels, of which the transposed [n, k] is given row-major; k and n are multiples of 16.
template <typename T, typename From>
Panels panels_of_transposed(const From* b, int64_t ld, int64_t k, int64_t n, uint32_t* to) {
  constexpr int64_t values = kLanes * kWord<T>;
  const int64_t steps = k / kWord<T>;
  for (int64_t c = 0; c < n; c += kLanes)
    for (int64_t i = 0; i < k; i += values) {
      const int64_t some = std::min(values, k - i) / kWord<T>;  // 16 words, or 8 at the end
      __m512i words[kLanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) {
        const From* row = b + (c + r) * ld + i;
        if constexpr (sizeof(T) == 4)
          words[r] = _mm512_loadu_si512(row);
        else
          words[r] = load_narrow(row, some == kLanes ? row + kLanes : nullptr);
      }
      transpose(words);
      uint32_t* there = to + c / kPanel * kPanel * steps + c % kPanel + i / kWord<T> * kPanel;
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r)
        if (r < some) _mm512_storeu_si512(there + r * kPanel, words[r]);
    }
  return {to, steps * kPanel, kPanel};
}

// Where a block of the result goes: float, or bfloat16; `past` the caches if nobody reads it soon.
struct Target {
  void* data;
  int64_t ld;
  bool narrow = false, past = false;
  Target at(int64_t row, int64_t column) const {
    const int64_t values = row * ld + column;
    return {static_cast<char*>(data) + values * (narrow ? 2 : 4), ld, narrow, past};
  }
};
inline Target target(float* data, int64_t ld) { return {data, ld, false, false}; }
inline Target target(BFloat16* data, int64_t ld) { return {data, ld, true, false}; }
// The same past the caches, where the memory is aligned as that needs.
template <typename T>
Target target_past_caches(T* data, int64_t ld) {
  Target found = target(data, ld);
  constexpr int64_t bytes = kLanes * sizeof(T);
  found.past = reinterpret_cast<uintptr_t>(data) % bytes == 0 && ld * sizeof(T) % bytes == 0;
  return found;
}

// Memory that is needed later: each step of a product has `stride` bytes of it fetched, one or two cache lines.
struct Ahead {
  const char *next = nullptr, *end = nullptr;
  int64_t stride = 64;
  void fetch() {
    if (next >= end) return;
    _mm_prefetch(next, _MM_HINT_T0);
    if (stride > 64) _mm_prefetch(next + 64, _MM_HINT_T0);
    next += stride;
  }
};

template <typename T>
__m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
  if constexpr (sizeof(T) == 4)
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  else
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// Write the sums of a block to rows of `ld` values.
template <int m, int v, typename W, typename Write>
inline __attribute__((always_inline)) void write(const __m512 (&sum)[m][v], W* to, int64_t ld, const Write& one) {
#pragma GCC unroll 12
  for (int i = 0; i < m; ++i)
#pragma GCC unroll 4
    for (int h = 0; h < v; ++h) one(to + i * ld + h * kLanes, Vec(sum[i][h]));
}

// C [m, 16 v] = A [m, k] @ B [k, 16 v], plus `from` unless it is null. Loops over m and v are unrolled, so that the sums
// are registers throughout.
template <typename T, int m, int v>
void block(
    const Left& a, int64_t steps, const uint32_t* b, int64_t ldb, const float* from, int64_t ld_from, const Target& to,
    Ahead& ahead) {
  constexpr int kTogether = 3;  // rows that are addressed from one pointer
  __m512 sum[m][v];
#pragma GCC unroll 12
  for (int i = 0; i < m; ++i)
#pragma GCC unroll 4
    for (int h = 0; h < v; ++h)
      sum[i][h] = from ? _mm512_loadu_ps(from + i * ld_from + h * kLanes) : _mm512_setzero_ps();
  const uint32_t* left[(m + kTogether - 1) / kTogether];
#pragma GCC unroll 12
  for (int i = 0; i < m; i += kTogether) left[i / kTogether] = a.words + i * a.row;
  Ahead later = ahead;
  for (int64_t k = 0; k < steps; ++k, b += ldb) {
    later.fetch();
    __m512i right[v];
#pragma GCC unroll 4
    for (int h = 0; h < v; ++h) right[h] = _mm512_loadu_si512(b + h * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < m; ++i) {
      int32_t word;
      std::memcpy(&word, left[i / kTogether] + i % kTogether * a.row, sizeof word);
#pragma GCC unroll 4
      for (int h = 0; h < v; ++h) sum[i][h] = multiply_add<T>(_mm512_set1_epi32(word), right[h], sum[i][h]);
    }
#pragma GCC unroll 12
    for (int i = 0; i < m; i += kTogether) left[i / kTogether] += a.step;
  }
  ahead = later;
  if constexpr (sizeof(T) == 2) {  // code for float has no instruction for bfloat16, which its processor may lack
    auto* narrow = static_cast<BFloat16*>(to.data);
    if (to.narrow && to.past) return write<m, v>(sum, narrow, to.ld, [](auto* p, Vec x) { store_past_caches(p, x); });
    if (to.narrow) return write<m, v>(sum, narrow, to.ld, [](auto* p, Vec x) { store(p, x); });
  }
  auto* wide = static_cast<float*>(to.data);
  to.past ? write<m, v>(sum, wide, to.ld, [](auto* p, Vec x) { store_past_caches(p, x); })
          : write<m, v>(sum, wide, to.ld, [](auto* p, Vec x) { store(p, x); });
}

using Block = void (*)(const Left&, int64_t, const uint32_t*, int64_t, const float*, int64_t, const Target&, Ahead&);

template <typename T, int v, int... m>
constexpr std::array<Block, sizeof...(m)> blocks_of(std::integer_sequence<int, m...>) {
  return {&block<T, m + 1, v>...};
}

// Products for 1 to all rows whose sums with 16 v columns fit the registers, 24 vectors.
template <typename T, int v>
constexpr auto blocks = blocks_of<T, v>(std::make_integer_sequence<int, v == 1 ? 12 : 24 / v>());

// C [m, 16 v] = A @ B + from as above, for any m: blocks of rows of nearly equal size.
template <typename T, int v>
void column(
    int64_t m, int64_t steps, const Left& a, const uint32_t* b, int64_t ldb, const float* from, int64_t ld_from,
    const Target& to, Ahead& ahead) {
  constexpr int64_t most = blocks<T, v>.size();
  int64_t left = (m + most - 1) / most;
  for (int64_t i = 0; i < m; --left) {
    const int64_t n = (m - i) / left;
    blocks<T, v>[n - 1](
        {a.words + i * a.row, a.row, a.step}, steps, b, ldb, from ? from + i * ld_from : nullptr, ld_from, to.at(i, 0),
        ahead);
    i += n;
  }
}

// C [m, n] = A [m, k] @ B [k, n], plus `from` unless it is null; n is a multiple of 16. k is given in words; sums of
// parts of a long one are kept in `sums` [m, n], which may be `from`.
template <typename T>
void product(
    int64_t m, int64_t n, int64_t steps, const Left& a, const Panels& b, const float* from, float* sums,
    const Target& to, Ahead& ahead) {
  constexpr int64_t most = kInner / kWord<T>;
  for (int64_t k = 0; k < steps; k += most) {
    const int64_t some = std::min(most, steps - k);
    const Target there = k + some < steps ? target(sums, n) : to;
    for (int64_t j = 0; j < n; j += kPanel) {
      const auto* right = b.words + j / kPanel * b.stride + k * b.ld;
      const float* given = k > 0 ? sums + j : from ? from + j : nullptr;
      const Left rows{a.words + k * a.step, a.row, a.step};
      const int64_t v = std::min(kPanel, n - j) / kLanes;
      const auto call = v == 1 ? column<T, 1> : v == 2 ? column<T, 2> : v == 3 ? column<T, 3> : column<T, 4>;
      call(m, some, rows, right, b.ld, given, n, there.at(0, j), ahead);
    }
  }
}

// Run `work(task, next)` for each task on PyTorch's number of threads; a thread takes the next task when one is done,
// which is about `next`, null for the last ones.
template <typename Task, typename Work>
void share(const std::vector<Task>& tasks, const Work& work) {
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks.size());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) {
      const Task* later = i + threads < tasks.size() ? &tasks[i + threads] : nullptr;
      if constexpr (std::is_invocable_v<Work, const Task&, const Task*>)
        work(tasks[i], later);
      else
        work(tasks[i]);
    }
  });
}

}  // namespace moelab
