// Products of small matrices whose layouts operands.h describes.
//
// A block of the result is summed in registers, in the order of k and by the same instructions whatever its size, so that
// a result has the same bits in any division into blocks. bfloat16 is multiplied in tiles where the processor has them.
#pragma once

#include "operands.h"
#if defined(__AMX_BF16__)
#include "tiles.h"
#endif

namespace moelab {

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

// Rows whose sums with v vectors of columns fit the registers, and the products for one to all of them.
template <typename T, int v>
constexpr int64_t kRowsOfBlock = std::min<int64_t>(12, kSums<T> / v);
template <typename T, int v>
constexpr auto blocks = blocks_of<T, v>(std::make_integer_sequence<int, kRowsOfBlock<T, v>>());

// C [m, v vectors] = A @ B + from as above, for any m: blocks of rows of nearly equal size.
template <typename T, int v>
void column(
    int64_t m, int64_t steps, const Left& a, const uint32_t* b, int64_t ldb, const float* from, int64_t ld_from,
    const Target& to, Ahead& ahead) {
  constexpr int64_t most = kRowsOfBlock<T, v>;
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
  constexpr int64_t most = kInner / kWord<T>, side = kSide * kLanes;
  for (int64_t k = 0; k < steps; k += most) {
    const int64_t some = std::min(most, steps - k);
    const Target there = k + some < steps ? target(sums, n) : to;
    const Left rows{a.words + k * a.step, a.row, a.step};
#if defined(__AMX_BF16__)
    if constexpr (sizeof(T) == 2) {
      product_of_tiles(m, n, some, rows, b.from(k), k > 0 ? sums : from, there, ahead);
      continue;
    }
#endif
    for (int64_t j = 0; j < n; j += side) {
      const auto* right = b.at(j) + k * b.ld;
      const float* given = k > 0 ? sums + j : from ? from + j : nullptr;
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
