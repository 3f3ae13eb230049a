// The experts' feed-forward networks and their gradients; experts.py describes the operation and checks the arguments.
//
// A task is one expert and some of its rows, or some of its inner columns, so that a result has the same bits however
// many threads share the tasks. M: width, F: inner width, N: columns of the first weights (2 F with gates, else F);
// M and F are multiples of 16. The kept slopes [R, N] are the derivatives of h = act(p) to p.
#include <torch/library.h>

#include "products.h"

namespace moelab {
namespace {

enum Activation : int64_t { kNone, kGelu, kGeluTanh, kSwiglu };

constexpr int64_t kTile = 64;      // rows of one product, forward
constexpr int64_t kDeep = 128;     // rows that a product of the weights' gradients sums over
constexpr int64_t kRows = 256;     // rows of a task
constexpr int64_t kColumns = 512;  // inner columns of a task

// Write act(p + bias) of `n` rows of `columns` inner columns to h, and the slopes unless they are null. If the
// activation has gates, p holds gate and up side by side, each `columns` wide; bias and slopes have them F apart.
template <typename T, typename W>
void activate(
    int64_t activation, const float* p, const W* bias, T* h, int64_t ld_h, T* slope, int64_t ld_slope, int64_t n,
    int64_t columns, int64_t F) {
  const bool gated = activation == kSwiglu;
  const int64_t ld = gated ? 2 * columns : columns;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec x = load(p + i * ld + j);
      if (bias) x = x + load(bias + j);
      Value found{x, Vec(1.f)};
      if (activation == kGelu) found = gelu(x);
      if (activation == kGeluTanh) found = gelu_tanh(x);
      if (gated) {
        Vec up = load(p + i * ld + columns + j);
        if (bias) up = up + load(bias + F + j);
        const Value s = silu(x);
        found = {s.value * up, s.slope * up};
        if (slope) store(slope + i * ld_slope + F + j, s.value);
      }
      store(h + i * ld_h + j, found.value);
      if (slope) store(slope + i * ld_slope + j, found.slope);
    }
}

template <typename T>
T* pointer(const std::optional<at::Tensor>& t) {
  return t.has_value() ? t->data_ptr<T>() : nullptr;
}

struct Part {
  int64_t expert, first, last;  // rows, or inner columns
};

// Return the experts' rows in parts of at most `kRows`, those of the busiest experts first.
std::vector<Part> row_parts(const int32_t* offsets, int64_t E, int64_t rows = kRows) {
  std::vector<Part> parts;
  for (int64_t e = 0; e < E; ++e)
    for (int64_t r = offsets[e]; r < offsets[e + 1]; r += rows)
      parts.push_back({e, r, std::min<int64_t>(r + rows, offsets[e + 1])});
  std::stable_sort(parts.begin(), parts.end(), [](Part a, Part b) { return a.last - a.first > b.last - b.first; });
  return parts;
}

// T: the rows' type, W: the weights'.
template <typename T, typename W>
void forward(
    const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& w1, const std::optional<at::Tensor>& b1,
    const at::Tensor& w2, const std::optional<at::Tensor>& b2, int64_t activation, const at::Tensor& y,
    const std::optional<at::Tensor>& kept_h, const std::optional<at::Tensor>& kept_slope) {
  const int64_t R = x.size(0), E = w1.size(0), M = w1.size(1), N = w1.size(2), F = w2.size(1), gates = N / F;
  const auto* o = offsets.data_ptr<int32_t>();
  const auto* X = x.data_ptr<T>();
  const auto *W1 = w1.data_ptr<W>(), *W2 = w2.data_ptr<W>(), *B1 = pointer<W>(b1), *B2 = pointer<W>(b2);
  auto *Y = y.data_ptr<T>(), *H = pointer<T>(kept_h), *S = pointer<T>(kept_slope);
  TORCH_CHECK(
      o[0] == 0 && std::is_sorted(o, o + E + 1) && o[E] <= R, "expert_ffn: offsets must rise from 0 to at most ", R);
  share(row_parts(o, E), [&](const Part& part) {
    const int64_t e = part.expert, most = std::min(F, kColumns);
    const bool packs = sizeof(T) == 2;
    auto& scratch = Scratch::of_thread();
    const int64_t packed1 = packs ? gates * panel_elements<T>(M, F) : 0;
    const int64_t packed2 = packs ? panel_elements<T>(F, M) : 0;
    scratch.reserve((packed1 + packed2 + kTile * most) * sizeof(T) + kTile * (gates * most + M) * sizeof(float));
    auto* to1 = scratch.take<T>(packed1);
    auto* to2 = scratch.take<T>(packed2);
    auto* p = scratch.take<float>(kTile * gates * most);
    auto* sum = scratch.take<float>(kTile * M);
    auto* h_tile = scratch.take<T>(kTile * most);
    std::vector<Panels<T>> first;
    for (int64_t g = 0; g < gates; ++g)
      first.push_back(panels(W1 + e * M * N + g * F, N, M, F, to1 + g * packed1 / gates));
    const auto second = panels(W2 + e * F * M, M, F, M, to2);
    for (int64_t r = part.first; r < part.last; r += kTile) {
      const int64_t n = std::min(kTile, part.last - r);
      const int64_t m = std::min(round_up(n, row_step<T>()), R - r);  // the next expert's rows do not matter
      for (int64_t s = 0; s < F; s += kColumns) {
        const int64_t columns = std::min(kColumns, F - s);
        for (int64_t g = 0; g < gates; ++g) {
          auto b = first[g];
          b.data += s / kPanel * b.stride;
          product<T>(m, columns, M, X + r * M, M, b, p + g * columns, gates * columns, false);
        }
        T* h = H ? H + r * F + s : h_tile;
        const int64_t ld_h = H ? F : columns;
        activate<T, W>(
            activation, p, B1 ? B1 + e * N + s : nullptr, h, ld_h, S ? S + r * N + s : nullptr, N, n, columns, F);
        product<T>(m, M, columns, h, ld_h, second.from(s), sum, M, s > 0);
      }
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < M; j += kLanes) {
          Vec value = load(sum + i * M + j);
          if (B2) value = value + load(B2 + e * M + j);
          store(Y + (r + i) * M + j, value);
        }
    }
  });
  std::fill(Y + o[E] * M, Y + R * M, T(0));
}

// Copy n rows and append zeros up to `padded` rows.
template <typename T>
void copy_rows(const T* from, int64_t ld, T* to, int64_t n, int64_t padded, int64_t columns) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * columns, from + i * ld, columns * sizeof(T));
  std::fill(to + n * columns, to + padded * columns, T(0));
}

// Write float32 rows as rows of W, whose row stride is `ld_to`; `past` the caches where nobody reads them soon.
template <typename W>
void convert(const float* from, W* to, int64_t rows, int64_t ld_to, int64_t columns, bool past = false) {
  const auto each = [&](const auto& write) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += kLanes) write(to + i * ld_to + j, load(from + i * columns + j));
  };
  if (!past || reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(W))) return each([](W* p, Vec v) { store(p, v); });
  each([](W* p, Vec v) { store_past_caches(p, v); });
  _mm_sfence();
}

template <typename T, typename W>
void backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& w1, const at::Tensor& w2,
    const at::Tensor& kept_h, const std::optional<at::Tensor>& kept_slope, const at::Tensor& d_pre,
    const std::optional<at::Tensor>& dx, const std::optional<at::Tensor>& dw1, const std::optional<at::Tensor>& db1,
    const std::optional<at::Tensor>& dw2, const std::optional<at::Tensor>& db2) {
  const int64_t R = x.size(0), E = w1.size(0), M = w1.size(1), N = w1.size(2), F = w2.size(1), gates = N / F;
  const auto* o = offsets.data_ptr<int32_t>();
  const auto *DY = dy.data_ptr<T>(), *X = x.data_ptr<T>(), *H = kept_h.data_ptr<T>(), *S = pointer<T>(kept_slope);
  const auto *W1 = w1.data_ptr<W>(), *W2 = w2.data_ptr<W>();
  auto *D = d_pre.data_ptr<T>(), *DX = pointer<T>(dx);
  auto *DW1 = pointer<W>(dw1), *DB1 = pointer<W>(db1), *DW2 = pointer<W>(dw2), *DB2 = pointer<W>(db2);
  constexpr bool narrow = sizeof(W) == 2;  // gradients are summed in float32 and converted at the end

  std::vector<Part> slices;
  for (const auto& all : row_parts(o, E, R))
    for (int64_t s = 0; s < F; s += kColumns) slices.push_back({all.expert, s, std::min(s + kColumns, F)});
  for (int64_t e = 0; e < E; ++e)
    if (o[e] == o[e + 1]) slices.push_back({e, 0, 0});

  // The gradients of the weights, and d pre, by inner columns.
  share(slices, [&](const Part& part) {
    const int64_t e = part.expert, s = part.first, columns = part.last - part.first;
    if (columns == 0) {
      if (DW1) std::fill_n(DW1 + e * M * N, M * N, W(0));
      if (DW2) std::fill_n(DW2 + e * F * M, F * M, W(0));
      if (DB1) std::fill_n(DB1 + e * N, N, W(0));
      if (DB2) std::fill_n(DB2 + e * M, M, W(0));
      return;
    }
    auto& scratch = Scratch::of_thread();
    const int64_t widest = std::max(M, columns);
    scratch.reserve(
        (panel_elements<T>(M, columns) + kLanes * M + kDeep * (M + columns + 3 * round_up(widest, kPanel))) *
            sizeof(T) +
        (kDeep * (columns + widest) + 2 * columns + M + (narrow ? M * columns * (gates + 1) : 0)) * sizeof(float));
    auto* to = scratch.take<T>(panel_elements<T>(M, columns));
    auto* row = scratch.take<T>(kLanes * M);
    auto* dy_tile = scratch.take<T>(kDeep * M);
    auto* d_tile = scratch.take<T>(kDeep * columns);
    auto* x_tile = scratch.take<T>(kDeep * widest);
    auto* turned = scratch.take<T>(kDeep * widest);
    auto* b_tile = scratch.take<T>(kDeep * round_up(widest, kPanel));
    auto* words = scratch.take<uint32_t>(kDeep / 2 * widest);
    auto* dh = scratch.take<float>(kDeep * columns);
    auto* sums1 = scratch.take<float>(gates * columns);
    auto* sums2 = scratch.take<float>(M);
    auto* wide1 = scratch.take<float>(narrow ? gates * M * columns : 0);
    auto* wide2 = scratch.take<float>(narrow ? columns * M : 0);
    const auto w2_t = panels_of_transposed(W2 + e * F * M + s * M, M, M, columns, to, row);
    std::fill_n(sums1, gates * columns, 0.f);
    std::fill_n(sums2, M, 0.f);
    for (int64_t r = o[e]; r < o[e + 1]; r += kDeep) {
      const int64_t n = std::min<int64_t>(kDeep, o[e + 1] - r), m = round_up(n, row_step<T>());
      const bool add = r > o[e];
      copy_rows(DY + r * M, M, dy_tile, n, m, M);
      product<T>(m, columns, M, dy_tile, M, w2_t, dh, columns, false);
      if (DW1) {
        copy_rows(X + r * M, M, x_tile, n, m, M);
        transposed(x_tile, M, turned, m, M, words);
      }
      for (int64_t g = 0; g < gates; ++g) {
        float* sums = sums1 + g * columns;
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < columns; j += kLanes) {
            Vec d = load(dh + i * columns + j);
            if (S) d = d * load(S + (r + i) * N + g * F + s + j);
            store(d_tile + i * columns + j, d);
            store(D + (r + i) * N + g * F + s + j, d);
            store(sums + j, load(sums + j) + d);
          }
        std::fill(d_tile + n * columns, d_tile + m * columns, T(0));
        if (DW1) {
          float* out = narrow ? wide1 + g * M * columns : reinterpret_cast<float*>(DW1) + e * M * N + g * F + s;
          product<T>(
              M, columns, m, turned, m, panels(d_tile, columns, m, columns, b_tile), out, narrow ? columns : N, add);
        }
      }
      if (DB2 && s == 0)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < M; j += kLanes) store(sums2 + j, load(sums2 + j) + load(dy_tile + i * M + j));
      if (DW2) {
        copy_rows(H + r * F + s, F, x_tile, n, m, columns);
        transposed(x_tile, columns, turned, m, columns, words);
        float* out = narrow ? wide2 : reinterpret_cast<float*>(DW2) + (e * F + s) * M;
        product<T>(columns, M, m, turned, m, panels(dy_tile, M, m, M, b_tile), out, M, add);
      }
    }
    if (narrow && DW1)
      for (int64_t g = 0; g < gates; ++g)
        convert(wide1 + g * M * columns, DW1 + e * M * N + g * F + s, M, N, columns, true);
    if (narrow && DW2) convert(wide2, DW2 + (e * F + s) * M, columns, M, M, true);
    if (DB1)
      for (int64_t g = 0; g < gates; ++g) convert(sums1 + g * columns, DB1 + e * N + g * F + s, 1, N, columns);
    if (DB2 && s == 0) convert(sums2, DB2 + e * M, 1, M, M);
  });

  if (!DX) return;
  share(row_parts(o, E), [&](const Part& part) {
    const int64_t e = part.expert;
    auto& scratch = Scratch::of_thread();
    scratch.reserve((panel_elements<T>(N, M) + kLanes * N) * sizeof(T) + kTile * M * sizeof(float));
    auto* to = scratch.take<T>(panel_elements<T>(N, M));
    auto* row = scratch.take<T>(kLanes * N);
    auto* sum = scratch.take<float>(kTile * M);
    const auto w1_t = panels_of_transposed(W1 + e * M * N, N, N, M, to, row);
    for (int64_t r = part.first; r < part.last; r += kTile) {
      const int64_t n = std::min(kTile, part.last - r), m = std::min(round_up(n, row_step<T>()), R - r);
      product<T>(m, M, N, D + r * N, N, w1_t, sum, M, false);
      convert(sum, DX + r * M, n, M, M);
    }
  });
  std::fill(DX + o[E] * M, DX + R * M, T(0));
}

void experts_forward(
    const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& w1, const std::optional<at::Tensor>& b1,
    const at::Tensor& w2, const std::optional<at::Tensor>& b2, int64_t activation, const at::Tensor& y,
    const std::optional<at::Tensor>& h, const std::optional<at::Tensor>& slope) {
  const auto call = x.scalar_type() == at::kFloat ? forward<float, float>
      : w1.scalar_type() == at::kFloat            ? forward<BFloat16, float>
                                                  : forward<BFloat16, BFloat16>;
  call(x, offsets, w1, b1, w2, b2, activation, y, h, slope);
}

void experts_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& w1, const at::Tensor& w2,
    const at::Tensor& h, const std::optional<at::Tensor>& slope, const at::Tensor& d_pre,
    const std::optional<at::Tensor>& dx, const std::optional<at::Tensor>& dw1, const std::optional<at::Tensor>& db1,
    const std::optional<at::Tensor>& dw2, const std::optional<at::Tensor>& db2) {
  const auto call = x.scalar_type() == at::kFloat ? backward<float, float>
      : w1.scalar_type() == at::kFloat            ? backward<BFloat16, float>
                                                  : backward<BFloat16, BFloat16>;
  call(dy, x, offsets, w1, w2, h, slope, d_pre, dx, dw1, db1, dw2, db2);
}

}  // namespace
}  // namespace moelab

TORCH_LIBRARY_FRAGMENT(moelab, library) {
  library.def(
      "experts_forward(Tensor x, Tensor offsets, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int activation, "
      "Tensor(a!) y, Tensor(b!)? h, Tensor(c!)? slope) -> ()");
  library.def(
      "experts_backward(Tensor dy, Tensor x, Tensor offsets, Tensor w1, Tensor w2, Tensor h, Tensor? slope, "
      "Tensor(a!) d_pre, Tensor(b!)? dx, Tensor(c!)? dw1, Tensor(d!)? db1, Tensor(e!)? dw2, Tensor(f!)? db2) -> ()");
}

TORCH_LIBRARY_IMPL(moelab, CPU, library) {
  library.impl("experts_forward", moelab::experts_forward);
  library.impl("experts_backward", moelab::experts_backward);
}
