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
constexpr int64_t kFetched = 256 << 10;  // bytes of the next task's weights that products have fetched

// Write act(p + bias) of `n` rows of `columns` inner columns to h, and the slopes unless they are null. If the
// activation has gates, p holds those and `up` the others; bias and slopes have them F apart.
template <typename T, typename W>
void activate(
    int64_t activation, const float* p, const float* up, const W* bias, T* h, int64_t ld_h, T* slope, int64_t ld_slope,
    int64_t n, int64_t columns, int64_t F) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec x = load(p + i * columns + j);
      if (bias) x = x + load(bias + j);
      Value found{x, Vec(1.f)};
      if (activation == kGelu) found = gelu(x);
      if (activation == kGeluTanh) found = gelu_tanh(x);
      if (activation == kSwiglu) {
        Vec u = load(up + i * columns + j);
        if (bias) u = u + load(bias + F + j);
        const Value s = silu(x);
        found = {s.value * u, s.slope * u};
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

// Have products fetch [first, last) while they run through `steps` steps, or the beginning of it.
template <typename W>
Ahead fetches(const W* first, const W* last, int64_t steps) {
  const auto *begin = reinterpret_cast<const char*>(first), *end = reinterpret_cast<const char*>(last);
  end = std::min(end, begin + kFetched);
  return {begin, end, end - begin > 64 * steps ? 128 : 64};
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
  share(row_parts(o, E), [&](const Part& part, const Part* next) {
    const int64_t e = part.expert, most = std::min(F, kColumns);
    const bool packs = sizeof(T) == 2;
    auto& scratch = Scratch::of_thread();
    const int64_t packed1 = packs ? panel_words<T>(M, F) : 0, packed2 = packs ? panel_words<T>(F, M) : 0;
    scratch.reserve(
        (gates * packed1 + packed2 + kTile * (gates * most + M)) * sizeof(float) + kTile * most * sizeof(T));
    auto* to1 = scratch.take<uint32_t>(gates * packed1);
    auto* to2 = scratch.take<uint32_t>(packed2);
    auto* h_tile = scratch.take<T>(kTile * most);
    auto* p = scratch.take<float>(kTile * gates * most);
    auto* sum = scratch.take<float>(kTile * M);
    std::vector<Panels> first;
    for (int64_t g = 0; g < gates; ++g)
      first.push_back(panels<T>(W1 + e * M * N + g * F, N, M, F, to1 + g * packed1));
    const auto second = panels<T>(W2 + e * F * M, M, F, M, to2);
    Ahead ahead1, ahead2;
    if (next && next->expert != e) {
      const int64_t n = next->expert, blocks = (part.last - part.first + 5) / 6;
      ahead1 = fetches(W1 + n * M * N, W1 + (n + 1) * M * N, blocks * (N / kPanel) * (M / kWord<T>));
      ahead2 = fetches(W2 + n * F * M, W2 + (n + 1) * F * M, blocks * (M / kPanel) * (F / kWord<T>));
    }
    for (int64_t r = part.first; r < part.last; r += kTile) {
      const int64_t n = std::min(kTile, part.last - r);
      for (int64_t s = 0; s < F; s += kColumns) {
        const int64_t columns = std::min(kColumns, F - s);
        for (int64_t g = 0; g < gates; ++g) {
          auto b = first[g];
          b.words += s / kPanel * b.stride;
          float* to = p + g * kTile * most;
          product<T>(n, columns, M / kWord<T>, rows(X + r * M, M), b, nullptr, to, target(to, columns), ahead1);
        }
        T* h = H ? H + r * F + s : h_tile;
        const int64_t ld_h = H ? F : columns;
        activate<T, W>(
            activation, p, p + kTile * most, B1 ? B1 + e * N + s : nullptr, h, ld_h, S ? S + r * N + s : nullptr, N, n,
            columns, F);
        product<T>(
            n, M, columns / kWord<T>, rows(h, ld_h), second.from(s / kWord<T>), s > 0 ? sum : nullptr, sum,
            target(sum, M), ahead2);
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

// Write d pre = d h * slope of n rows, which are `ld` values apart, and add them to the sums of their columns. Return
// d pre as the B of a product; bfloat16 is packed into `to` for that.
template <typename T>
Panels differentiate(
    const float* dh, const T* slope, T* d, int64_t ld, float* sums, int64_t n, int64_t columns, uint32_t* to) {
  const int64_t steps = (n + 1) / 2;
  const auto one = [&](int64_t i, int64_t j) {
    Vec value = load(dh + i * columns + j);
    if (slope) value = value * load(slope + i * ld + j);
    store(d + i * ld + j, value);
    return value;
  };
  for (int64_t i = 0; i < n; i += 2)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vec first = one(i, j), second = i + 1 < n ? one(i + 1, j) : Vec(0.f);
      store(sums + j, load(sums + j) + first + second);
      if constexpr (sizeof(T) == 2)
        _mm512_storeu_si512(
            to + j / kPanel * kPanel * steps + i / 2 * kPanel + j % kPanel,
            side_by_side((__m512i)_mm512_cvtne2ps_pbh(second, first)));
    }
  if constexpr (sizeof(T) == 2) return {to, steps * kPanel, kPanel};
  return {reinterpret_cast<const uint32_t*>(d), kPanel, ld};
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

  std::vector<Part> slices;
  for (const auto& all : row_parts(o, E, R))
    for (int64_t s = 0; s < F; s += kColumns) slices.push_back({all.expert, s, std::min(s + kColumns, F)});
  for (int64_t e = 0; e < E; ++e)
    if (o[e] == o[e + 1]) slices.push_back({e, 0, 0});

  // The gradients of the weights, and d pre, by inner columns.
  share(slices, [&](const Part& part, const Part* next) {
    const int64_t e = part.expert, s = part.first, columns = part.last - part.first;
    if (columns == 0) {
      if (DW1) clear_past_caches(DW1 + e * M * N, M * N);
      if (DW2) clear_past_caches(DW2 + e * F * M, F * M);
      if (DB1) std::fill_n(DB1 + e * N, N, W(0));
      if (DB2) std::fill_n(DB2 + e * M, M, W(0));
      _mm_sfence();  // after writes past the caches
      return;
    }
    const bool packs = sizeof(T) == 2, several = o[e + 1] - o[e] > kDeep;
    auto& scratch = Scratch::of_thread();
    const int64_t tile = packs ? kDeep / 2 * (M + columns + round_up(M, kPanel) + round_up(columns, kPanel)) : 0;
    const int64_t sums = several ? M * columns * (gates + 1) : 0;
    scratch.reserve(
        (panel_words<T>(M, columns) + tile + kDeep * columns + gates * columns + M + sums) * sizeof(float));
    auto* to = scratch.take<uint32_t>(panel_words<T>(M, columns));
    auto* x_words = scratch.take<uint32_t>(packs ? kDeep / 2 * M : 0);
    auto* h_words = scratch.take<uint32_t>(packs ? kDeep / 2 * columns : 0);
    auto* dy_words = scratch.take<uint32_t>(packs ? kDeep / 2 * round_up(M, kPanel) : 0);
    auto* d_words = scratch.take<uint32_t>(packs ? kDeep / 2 * round_up(columns, kPanel) : 0);
    auto* dh = scratch.take<float>(kDeep * columns);
    auto* sums_b1 = scratch.take<float>(gates * columns);
    auto* sums_b2 = scratch.take<float>(M);
    auto* sums_w1 = scratch.take<float>(several ? gates * M * columns : 0);
    auto* sums_w2 = scratch.take<float>(several ? columns * M : 0);
    const auto w2_t = panels_of_transposed<T>(W2 + e * F * M + s * M, M, M, columns, to);
    Ahead ahead;
    if (next && next->last > 0) {
      const W* first = W2 + next->expert * F * M + next->first * M;
      const int64_t blocks = (o[e + 1] - o[e] + 5) / 6 + 2 * (M / 6 + 1);
      ahead = fetches(first, first + (next->last - next->first) * M, blocks * (columns / kPanel) * (M / kWord<T>));
    }
    std::fill_n(sums_b1, gates * columns, 0.f);
    std::fill_n(sums_b2, M, 0.f);
    for (int64_t r = o[e]; r < o[e + 1]; r += kDeep) {
      const int64_t n = std::min<int64_t>(kDeep, o[e + 1] - r), steps = (n + kWord<T> - 1) / kWord<T>;
      const bool more = r > o[e], last = r + n == o[e + 1];  // sums of part of the rows stay in `sums`
      product<T>(n, columns, M / kWord<T>, rows(DY + r * M, M), w2_t, nullptr, dh, target(dh, columns), ahead);
      const auto x_t = DW1 ? transposed(X + r * M, M, n, M, x_words) : Left{};
      for (int64_t g = 0; g < gates; ++g) {
        const int64_t at = r * N + g * F + s;
        const auto d = differentiate(dh, S ? S + at : nullptr, D + at, N, sums_b1 + g * columns, n, columns, d_words);
        float* sum = sums_w1 + g * M * columns;
        const auto to = last ? target_past_caches(DW1 + e * M * N + g * F + s, N) : target(sum, columns);
        if (DW1) product<T>(M, columns, steps, x_t, d, more ? sum : nullptr, sum, to, ahead);
      }
      if (DB2 && s == 0)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < M; j += kLanes)
            store(sums_b2 + j, load(sums_b2 + j) + load(DY + (r + i) * M + j));
      if (DW2) {
        const auto h_t = transposed(H + r * F + s, F, n, columns, h_words);
        const auto right = panels<T>(DY + r * M, M, n, M, dy_words);
        const auto to = last ? target_past_caches(DW2 + (e * F + s) * M, M) : target(sums_w2, M);
        product<T>(columns, M, steps, h_t, right, more ? sums_w2 : nullptr, sums_w2, to, ahead);
      }
    }
    if (DB1)
      for (int64_t g = 0; g < gates; ++g) copy(sums_b1 + g * columns, DB1 + e * N + g * F + s, columns);
    if (DB2 && s == 0) copy(sums_b2, DB2 + e * M, M);
    _mm_sfence();
  });

  if (!DX) return;
  share(row_parts(o, E), [&](const Part& part, const Part* next) {
    const int64_t e = part.expert;
    auto& scratch = Scratch::of_thread();
    scratch.reserve((panel_words<T>(N, M) + kTile * M) * sizeof(float));
    auto* to = scratch.take<uint32_t>(panel_words<T>(N, M));
    auto* sum = scratch.take<float>(kTile * M);
    const auto w1_t = panels_of_transposed<T>(W1 + e * M * N, N, N, M, to);
    Ahead ahead;
    if (next && next->expert != e) {
      const W* first = W1 + next->expert * M * N;
      ahead = fetches(first, first + M * N, (part.last - part.first + 5) / 6 * (M / kPanel) * (N / kWord<T>));
    }
    for (int64_t r = part.first; r < part.last; r += kTile) {
      const int64_t n = std::min(kTile, part.last - r);
      product<T>(n, M, N / kWord<T>, rows(D + r * N, N), w1_t, nullptr, sum, target(DX + r * M, M), ahead);
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
