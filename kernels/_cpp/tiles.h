// Products of bfloat16 by AMX.
//
// A tile is a register of 16 rows of 16 words; the processor multiplies two tiles at a time and sums in float. A block
// of the result is two tiles of rows and two of columns (0 to 3), of A two (4, 5) and of B two (6, 7). A row of a
// result is summed in the order of k, whatever rows are beside it.
#pragma once

#include "operands.h"

namespace moelab {

constexpr int64_t kTileRows = 16;

// Makes the thread's tiles ready while it lasts, those of A and of the result with fewer rows where fewer are left.
class Tiles {
 public:
  explicit Tiles(int64_t rows) {
    struct alignas(64) Shape {
      uint8_t palette = 1, start = 0, zeros[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) {
      shape.bytes[tile] = 4 * kLanes;
      shape.rows[tile] = tile < 6 ? std::min(rows, kTileRows) : kTileRows;
    }
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// The sums of a block of 16 or 32 rows and columns. The first `whole` words of a column of B lie at b, those after them
// at rest.
template <bool two_rows, bool two_columns>
void sum_tiles(
    int64_t steps, int64_t whole, const uint32_t* a, int64_t row, const uint32_t* b, int64_t ld, const uint32_t* rest,
    int64_t ld_rest, float* sums, Ahead& ahead) {
  _tile_zero(0);
  if constexpr (two_columns) _tile_zero(1);
  if constexpr (two_rows) _tile_zero(2);
  if constexpr (two_rows && two_columns) _tile_zero(3);
  for (int64_t k = 0; k < steps; k += kTileRows) {
    const auto* right = k < whole ? b + k * ld : rest;
    const int64_t bytes = 4 * (k < whole ? ld : ld_rest);
    _tile_loadd(4, a + k, row * 4);
    _tile_loadd(6, right, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (two_columns) {
      _tile_loadd(7, right + kLanes, bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (two_rows) {
      _tile_loadd(5, a + kTileRows * row + k, row * 4);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (two_columns) _tile_dpbf16ps(3, 5, 7);
    }
    for (int i = 0; i < (two_rows ? 3 : 2) * kTileRows && ahead.next < ahead.end; ++i) ahead.fetch();
  }
  constexpr int64_t ld_sums = 2 * kLanes;
  _tile_stored(0, sums, ld_sums * 4);
  if constexpr (two_columns) _tile_stored(1, sums + kLanes, ld_sums * 4);
  if constexpr (two_rows) _tile_stored(2, sums + kTileRows * ld_sums, ld_sums * 4);
  if constexpr (two_rows && two_columns) _tile_stored(3, sums + kTileRows * ld_sums + kLanes, ld_sums * 4);
}

// Rows of A as they are needed for tiles: contiguous, and zeros up to a multiple of 16 words. If A is the transposed of
// a matrix, rows come in sixteens.
inline void pack_rows(const Left& a, int64_t rows, int64_t steps, uint32_t* to, int64_t ld) {
  if (a.step == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(to + i * ld, a.words + i * a.row, steps * 4);
      std::fill(to + i * ld + steps, to + i * ld + ld, 0u);
    }
    return;
  }
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t k = 0; k < ld; k += kLanes) {
      Words words[kLanes];
      for (int64_t r = 0; r < kLanes; ++r)
        words[r] = k + r < steps ? load_as<Words>(a.words + i + (k + r) * a.step) : Words{};
      transpose(words);
      for (int64_t r = 0; r < kLanes; ++r) store_as(to + (i + r) * ld + k, words[r]);
    }
}

// C = A @ B + from of bfloat16, as `product`, of at most kInner rows of B.
inline void product_of_tiles(
    int64_t m, int64_t n, int64_t steps, const Left& a, const Panels& b, const float* from, const Target& to,
    Ahead& ahead) {
  constexpr int64_t side = 2 * kLanes;
  alignas(64) static thread_local uint32_t left[2 * kTileRows * kInner / 2];
  alignas(64) static thread_local float sums[2 * kTileRows * side];
  static thread_local std::vector<uint32_t> rest;  // the last words of B, with zeros up to a tile
  const int64_t whole = steps / kTileRows * kTileRows, ld = round_up(steps, kTileRows), ld_rest = round_up(n, side);
  if (whole < steps) {
    rest.assign(kTileRows * ld_rest, 0u);
    for (int64_t k = whole; k < steps; ++k)
      for (int64_t j = 0; j < n; j += kLanes)
        store_as(rest.data() + (k - whole) * ld_rest + j, load_as<Words>(b.at(j) + k * b.ld));
  }
  for (int64_t i = 0, rows; i < m; i += rows) {
    rows = m - i >= 2 * kTileRows ? 2 * kTileRows : std::min(m - i, kTileRows);
    const bool as_it_lies = a.step == 1 && whole == steps;
    const Left mine{a.words + i * a.row, a.row, a.step};
    if (!as_it_lies) pack_rows(mine, rows, steps, left, ld);
    const Tiles ready(rows);
    for (int64_t j = 0; j < n; j += side) {
      const int64_t columns = std::min(side, n - j);
      const auto call = columns > kLanes ? (rows > kTileRows ? sum_tiles<true, true> : sum_tiles<false, true>)
                                         : (rows > kTileRows ? sum_tiles<true, false> : sum_tiles<false, false>);
      call(
          steps, whole, as_it_lies ? mine.words : left, as_it_lies ? a.row : ld,
          b.at(j), b.ld, rest.data() + j, ld_rest, sums, ahead);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; c += kLanes) {
          Vec sum = load(sums + r * side + c);
          if (from) sum = sum + load(from + (i + r) * n + j + c);
          const Target there = to.at(i + r, j + c);
          if (to.narrow)
            there.write(static_cast<BFloat16*>(there.data), sum);
          else
            there.write(static_cast<float*>(there.data), sum);
        }
    }
  }
}

}  // namespace moelab
