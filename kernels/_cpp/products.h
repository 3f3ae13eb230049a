// Products of small matrices, and the layouts that they need.
//
// A product goes step by step through the inner dimension k. What a step takes of a row of A or of a column of B is a
// word: a float, or two bfloat16 values of neighbouring k. A block of the result is summed in registers, in the order
// of k and by the same instructions whatever its size, so that a result has the same bits in any division into blocks.
// B [k, n] lies in panels of 64 columns:
//
//   float     panel [k][64], or the matrix itself, seen as panels with a common row stride;
//   bfloat16  panel [k / 2][64][2]: two rows side by side ("VNNI"), as processors with AVX512_BF16 read them. Others
//             multiply the two values of a word as floats.
//
// A may lie in either order. Meanwhile memory can fetch what is needed later (Ahead).
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "operation.h"
#include "vectors.h"

namespace moelab {

constexpr int64_t kPanel = 64;    // columns of a panel
constexpr int64_t kInner = 512;   // inner length of one product: a panel of it stays in a core's second-level cache

// Sums that a block keeps in registers, and how many of them are side by side.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kSide = 4;
template <typename T>
constexpr int64_t kSums = sizeof(T) == 4 || kMultipliesBFloat16 ? 24 : 20;  // of 32 registers
#else
constexpr int64_t kSide = 2;
template <typename T>
constexpr int64_t kSums = sizeof(T) == 4 ? 12 : 8;  // of 16 registers
#endif

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
};

// Words of B [k, n] in panels.
template <typename T>
int64_t panel_words(int64_t k, int64_t n) { return (k + kWord<T> - 1) / kWord<T> * round_up(n, kPanel); }

// Return B [k, n] of T, given row-major, in panels: float as it lies, bfloat16 written to `to`.
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

// The values of words, as floats: one, or of bfloat16 two, unless the processor multiplies these.
template <typename T>
struct Factors {
  Words low;
  Vec high;
  explicit Factors(Words w) : low(w) {
    if constexpr (sizeof(T) == 2 && !kMultipliesBFloat16) {
      low = w << 16;
      high = same_bits<Vec>(w & 0xffff0000u);
    }
  }
};

template <typename T>
inline __attribute__((always_inline)) Vec multiply_add(const Factors<T>& a, const Factors<T>& b, Vec sum) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) return _mm512_dpbf16_ps(sum, same_bits<__m512bh>(a.low), same_bits<__m512bh>(b.low));
#endif
  sum = fma(same_bits<Vec>(a.low), same_bits<Vec>(b.low), sum);
  if constexpr (sizeof(T) == 2) sum = fma(a.high, b.high, sum);
  return sum;
}

// Write the sums of a block to rows of `ld` values.
template <int m, int v, typename W, typename Write>
inline __attribute__((always_inline)) void write(const Vec (&sum)[m][v], W* to, int64_t ld, const Write& one) {
#pragma GCC unroll 12
  for (int i = 0; i < m; ++i)
#pragma GCC unroll 4
    for (int h = 0; h < v; ++h) one(to + i * ld + h * kLanes, sum[i][h]);
}

// C [m, v vectors] = A [m, k] @ B [k, v vectors], plus `from` unless it is null. Loops over m and v are unrolled, so that
// the sums are registers throughout.
template <typename T, int m, int v>
void block(
    const Left& a, int64_t steps, const uint32_t* b, int64_t ldb, const float* from, int64_t ld_from, const Target& to,
    Ahead& ahead) {
  constexpr int kTogether = 3;  // rows that are addressed from one pointer
  Vec sum[m][v];
#pragma GCC unroll 12
  for (int i = 0; i < m; ++i)
#pragma GCC unroll 4
    for (int h = 0; h < v; ++h) sum[i][h] = from ? load(from + i * ld_from + h * kLanes) : Vec{};
  const uint32_t* left[(m + kTogether - 1) / kTogether];
#pragma GCC unroll 12
  for (int i = 0; i < m; i += kTogether) left[i / kTogether] = a.words + i * a.row;
  Ahead later = ahead;
  for (int64_t k = 0; k < steps; ++k, b += ldb) {
    later.fetch();
    const auto right = [&]<size_t... h>(std::index_sequence<h...>) {
      return std::array<Factors<T>, v>{Factors<T>(load_as<Words>(b + h * kLanes))...};
    }(std::make_index_sequence<v>());
#pragma GCC unroll 12
    for (int i = 0; i < m; ++i) {
      const Factors<T> one(all(left[i / kTogether][i % kTogether * a.row]));
#pragma GCC unroll 4
      for (int h = 0; h < v; ++h) sum[i][h] = multiply_add<T>(one, right[h], sum[i][h]);
    }
#pragma GCC unroll 12
    for (int i = 0; i < m; i += kTogether) left[i / kTogether] += a.step;
  }
  ahead = later;
  auto* wide = static_cast<float*>(to.data);
  auto* narrow = static_cast<BFloat16*>(to.data);
  const auto past = [](auto* p, Vec x) { store_past_caches(p, x); };
  const auto plain = [](auto* p, Vec x) { store(p, x); };
  if (sizeof(T) == 2 && to.narrow)
    to.past ? write<m, v>(sum, narrow, to.ld, past) : write<m, v>(sum, narrow, to.ld, plain);
  else
    to.past ? write<m, v>(sum, wide, to.ld, past) : write<m, v>(sum, wide, to.ld, plain);
}

using Block = void (*)(const Left&, int64_t, const uint32_t*, int64_t, const float*, int64_t, const Target&, Ahead&);

template <typename T, int v, int... m>
constexpr std::array<Block, sizeof...(m)> blocks_of(std::integer_sequence<int, m...>) {
  return {&block<T, m + 1, v>...};
}

// Products for 1 to all rows whose sums with v vectors of columns fit the registers.
template <typename T, int v>
constexpr auto blocks = blocks_of<T, v>(std::make_integer_sequence<int, std::min<int64_t>(12, kSums<T> / v)>());

// C [m, v vectors] = A @ B + from as above, for any m: blocks of rows of nearly equal size.
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

#if defined(__AMX_BF16__)
// Tiles: matrices of 16 rows of 16 words in registers of their own, which the processor multiplies at a time.
constexpr int64_t kTileRows = 16;

// Makes the thread's tile registers ready while it lasts.
class Tiles {
 public:
  Tiles() {
    alignas(64) struct { uint8_t palette = 1, start = 0, zeros[14] = {}; uint16_t bytes[16]; uint8_t rows[16]; } shape;
    for (int i = 0; i < 16; ++i) shape.bytes[i] = i < 8 ? 64 : 0, shape.rows[i] = i < 8 ? kTileRows : 0;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// Sums [up to 32, 32] = A @ B, of two tiles of rows and of columns, or of one of either.
template <bool two_rows, bool two_columns>
void tiles(
    int64_t steps, const uint32_t* a, int64_t row, const uint32_t* b, int64_t ld, float* sums, Ahead& ahead) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; k += kTileRows) {
    _tile_loadd(4, a + k, row * 4);
    _tile_loadd(6, b + k * ld, ld * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (two_columns) {
      _tile_loadd(7, b + k * ld + kLanes, ld * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (two_rows) {
      _tile_loadd(5, a + kTileRows * row + k, row * 4);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (two_columns) _tile_dpbf16ps(3, 5, 7);
    }
    for (int i = 0; i < (two_rows ? 96 : 32); ++i) ahead.fetch();
  }
  constexpr int64_t bytes = 2 * kLanes * 4;
  _tile_stored(0, sums, bytes);
  if constexpr (two_columns) _tile_stored(1, sums + kLanes, bytes);
  if constexpr (two_rows) _tile_stored(2, sums + kTileRows * 2 * kLanes, bytes);
  if constexpr (two_rows && two_columns) _tile_stored(3, sums + kTileRows * 2 * kLanes + kLanes, bytes);
}

// `product` of rows as they lie, where k is a multiple of 16 words.
inline void product_of_tiles(
    int64_t m, int64_t n, int64_t steps, const Left& a, const Panels& b, const float* from, const Target& to,
    Ahead& ahead) {
  alignas(64) float sums[2 * kTileRows * 2 * kLanes];
  const int64_t whole = m / kTileRows * kTileRows, rest = m - whole;
  alignas(64) static thread_local uint32_t last[kTileRows * (kInner / 2)];  // the last rows, filled up to a tile
  for (int64_t i = 0; i < rest; ++i) std::memcpy(last + i * steps, a.words + (whole + i) * a.row, steps * 4);
  const Tiles ready;
  for (int64_t j = 0; j < n; j += 2 * kLanes) {
    const int64_t columns = std::min(2 * kLanes, n - j);
    const auto* right = b.words + j / kPanel * b.stride + j % kPanel;
    for (int64_t i = 0; i < m;) {
      const bool two = i + 2 * kTileRows <= whole, own = i < whole;
      const int64_t rows = std::min(two ? 2 * kTileRows : kTileRows, m - i);
      const auto call = columns > kLanes ? (two ? tiles<true, true> : tiles<false, true>)
                                         : (two ? tiles<true, false> : tiles<false, false>);
      call(steps, own ? a.words + i * a.row : last, own ? a.row : steps, right, b.ld, sums, ahead);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; c += kLanes) {
          Vec sum = load(sums + r * 2 * kLanes + c);
          if (from) sum = sum + load(from + (i + r) * n + j + c);
          const int64_t at = (i + r) * to.ld + j + c;
          if (to.narrow) {
            auto* there = static_cast<BFloat16*>(to.data) + at;
            to.past ? store_past_caches(there, sum) : store(there, sum);
          } else {
            auto* there = static_cast<float*>(to.data) + at;
            to.past ? store_past_caches(there, sum) : store(there, sum);
          }
        }
      i += rows;
    }
  }
}
#endif

// C [m, n] = A [m, k] @ B [k, n], plus `from` unless it is null; n is a multiple of 16. k is given in words; sums of
// parts of a long one are kept in `sums` [m, n], which may be `from`.
template <typename T>
void product(
    int64_t m, int64_t n, int64_t steps, const Left& a, const Panels& b, const float* from, float* sums,
    const Target& to, Ahead& ahead) {
  constexpr int64_t most = kInner / kWord<T>, side = kSide * kLanes;
  for (int64_t k = 0; k < steps; k += most) {
    const int64_t some = std::min(most, steps - k);
    const Target there = k + some < steps ? target(sums, n) : to;
#if defined(__AMX_BF16__)
    if (sizeof(T) == 2 && a.step == 1 && steps % kTileRows == 0) {
      product_of_tiles(m, n, some, {a.words + k, a.row, 1}, b.from(k), k > 0 ? sums : from, there, ahead);
      continue;
    }
#endif
    for (int64_t j = 0; j < n; j += side) {
      const auto* right = b.words + j / kPanel * b.stride + j % kPanel + k * b.ld;
      const float* given = k > 0 ? sums + j : from ? from + j : nullptr;
      const Left rows{a.words + k * a.step, a.row, a.step};
      const auto call = [&]<int v>() { column<T, v>(m, some, rows, right, b.ld, given, n, there.at(0, j), ahead); };
      const int64_t v = std::min(side, n - j) / kLanes;
      if (v == kSide)
        call.template operator()<kSide>();
      else if (v == 1)
        call.template operator()<1>();
      else if (v == 2)
        call.template operator()<2>();
      else
        call.template operator()<3>();
    }
  }
}

// Compiled once, by products.cpp.
#define MOELAB_PRODUCT(T) \
  template void product<T>( \
      int64_t, int64_t, int64_t, const Left&, const Panels&, const float*, float*, const Target&, Ahead&)
extern MOELAB_PRODUCT(float);
extern MOELAB_PRODUCT(BFloat16);

}  // namespace moelab
