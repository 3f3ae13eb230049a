// The operands of products and their layouts.
//
// A product goes step by step through the inner dimension k. What a step takes of a row of A or of a column of B is a
// word: a float, or two bfloat16 values of neighbouring k. B [k, n] lies in panels of 64 columns:
//
//   float     panel [k][64], or, unless its rows lie far apart, the matrix itself: panels with a common row stride;
//   bfloat16  panel [k / 2][64][2]: two rows side by side ("VNNI"), as processors with AVX512_BF16 and AMX read them.
//             Others multiply the two values of a word as floats.
//
// A may lie in either order. Meanwhile memory can fetch what is needed later (Ahead).
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "operation.h"
#include "vectors.h"

namespace moelab {

constexpr int64_t kPanel = 64;       // columns of a panel
constexpr int64_t kFarApart = 1024;  // values from row to row of a float matrix beyond which it is written in panels
constexpr int64_t kInner = 512;      // inner length of one product: a panel of it stays in a core's second-level cache

// Values in a word.
template <typename T>
constexpr int64_t kWord = 4 / sizeof(T);

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Write pairs of rows as words [rows / 2, columns], after the last of an odd number zeros; columns: a multiple of 16.
template <typename From>
void interleave(const From* in, int64_t ld_in, uint32_t* out, int64_t ld_out, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < columns; c += kLanes) {
      const From* first = in + r * ld_in + c;
      store_as(out + r / 2 * ld_out + c, pair_up(first, r + 1 < rows ? first + ld_in : nullptr));
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
      size_ = 0;
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 4096))));
      check(memory_ != nullptr, "no memory for ", bytes, " bytes");
      size_ = round_up(bytes, 4096);
    }
  }
  template <typename T>
  T* take(int64_t n) {
    T* found = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += round_up(n * sizeof(T), 64);
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
  // The first word of a column.
  const uint32_t* at(int64_t column) const { return words + column / kPanel * stride + column % kPanel; }
};

// Return whether B, whose rows lie `ld` values apart, is written in panels. Rows far apart share few sets of the caches
// and need a page each.
template <typename T>
bool packs(int64_t ld) { return sizeof(T) == 2 || ld > kFarApart; }

// Words of B [k, n] in panels.
template <typename T>
int64_t panel_words(int64_t k, int64_t n) { return (k + kWord<T> - 1) / kWord<T> * round_up(n, kPanel); }

// Return B [k, n] of T, given row-major, in panels: written to `to`, unless they are of float and the rows lie close
// enough together to be read as they are.
template <typename T, typename From>
Panels panels(const From* b, int64_t ld, int64_t k, int64_t n, uint32_t* to) {
  const int64_t steps = (k + kWord<T> - 1) / kWord<T>;
  if (!packs<T>(ld)) return {reinterpret_cast<const uint32_t*>(b), kPanel, ld};
  for (int64_t c = 0; c < n; c += kPanel) {
    const int64_t columns = std::min(kPanel, n - c);
    if constexpr (sizeof(T) == 2)
      interleave(b + c, ld, to + c * steps, kPanel, k, columns);
    else
      for (int64_t r = 0; r < k; ++r) std::memcpy(to + c * steps + r * kPanel, b + r * ld + c, columns * sizeof(T));
  }
  return {to, steps * kPanel, kPanel};
}

// Return B [k, n] of T in panels, of which the transposed [n, k] is given row-major; k and n are multiples of 16.
template <typename T, typename From>
Panels panels_of_transposed(const From* b, int64_t ld, int64_t k, int64_t n, uint32_t* to) {
  const int64_t steps = k / kWord<T>;
  for (int64_t c = 0; c < n; c += kLanes)
    for (int64_t i = 0; i < steps; i += kLanes) {
      const int64_t some = std::min(kLanes, steps - i);
      Words words[kLanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) {
        const From* row = b + (c + r) * ld + i * kWord<T>;
        if constexpr (sizeof(T) == 4)
          words[r] = load_as<Words>(row);
        else
          words[r] = neighbours(row, some);
      }
      transpose(words);
      uint32_t* there = to + c / kPanel * kPanel * steps + c % kPanel + i * kPanel;
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r)
        if (r < some) store_as(there + r * kPanel, words[r]);
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
  template <typename T>
  void write(T* there, Vec x) const { past ? store_past_caches(there, x) : store(there, x); }
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
    __builtin_prefetch(next);
    if (stride > 64) __builtin_prefetch(next + 64);
    next += stride;
  }
};

}  // namespace moelab
