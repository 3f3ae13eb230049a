// The experts' feed-forward networks and their gradients; kernels/experts.py describes the operation and
// checks the arguments.
//
// A task is one expert and some of its rows, or some of its inner columns, so that a result has the same bits however
// many threads share the tasks. M: width, F: inner width, N: columns of the first weights (2 F with gates, else F);
// M and F are multiples of 16. The kept slopes [R, N] are the derivatives of h = act(p) to p.
#include "decode.h"
#include "packed.h"
#include "permute.h"

namespace moelab {
namespace {

constexpr int64_t kTile = 64;      // rows of one product, forward
constexpr int64_t kDeep = 128;     // rows that a product of the weights' gradients sums over
constexpr int64_t kRows = 512;     // rows of a task
constexpr int64_t kColumns = 512;  // inner columns of a task
constexpr int64_t kFetched = 256 << 10;  // bytes of the next task's weights that products have fetched

// Write act(p + bias) of `n` rows of `columns` inner columns to h, and the slopes unless they are null. If the
// activation has gates, p holds those and `up` the others; bias and slopes have them F apart.
template <typename T, typename W>
void activate_rows(
    int64_t activation, const float* p, const float* up, const W* bias, T* h, int64_t ld_h, T* slope, int64_t ld_slope,
    int64_t n, int64_t columns, int64_t F) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec x = load(p + i * columns + j), u{};
      if (bias) x = x + load(bias + j);
      if (activation == kSwiglu) {
        u = load(up + i * columns + j);
        if (bias) u = u + load(bias + F + j);
        if (slope) store(slope + i * ld_slope + F + j, silu(x).value);
      }
      const Value found = activate(activation, x, u);
      store(h + i * ld_h + j, found.value);
      if (slope) store(slope + i * ld_slope + j, found.slope);
    }
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
    const Tensor& x, const Tensor& offsets, const Tensor& w1, const Optional& b1, const Tensor& w2, const Optional& b2,
    int64_t activation, const Tensor& y, const Optional& kept_h, const Optional& kept_slope) {
  const int64_t R = x.size(0), E = w1.size(0), M = w1.size(1), N = w1.size(2), F = w2.size(1), gates = N / F;
  const auto* o = data<int32_t>(offsets);
  const auto* X = data<T>(x);
  const auto *W1 = data<W>(w1), *W2 = data<W>(w2), *B1 = data<W>(b1), *B2 = data<W>(b2);
  auto *Y = data<T>(y), *H = data<T>(kept_h), *S = data<T>(kept_slope);
  const bool rising = o[0] == 0 && std::is_sorted(o, o + E + 1) && o[E] <= R;
  check(rising, "expert_ffn: offsets must rise from 0 to at most ", R);
  share(row_parts(o, E), [&](const Part& part, const Part* next) {
    const int64_t e = part.expert, most = std::min(F, kColumns);
    auto& scratch = Scratch::of_thread();
    const int64_t packed1 = packs<T>(N) ? panel_words<T>(M, F) : 0, packed2 = packs<T>(M) ? panel_words<T>(F, M) : 0;
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
        activate_rows<T, W>(
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
  std::memset(Y + o[E] * M, 0, (R - o[E]) * M * sizeof(T));
}

// Write d pre = d h * slope of n rows, which are `ld` values apart, and add them to the sums of their columns. Return
// d pre as the B of a product, in panels at `to` where it needs them.
template <typename T>
Panels differentiate(
    const float* dh, const T* slope, T* d, int64_t ld, float* sums, int64_t n, int64_t columns, uint32_t* to) {
  const int64_t steps = (n + kWord<T> - 1) / kWord<T>;
  const auto one = [&](int64_t i, int64_t j) {
    Vec value = load(dh + i * columns + j);
    if (slope) value = value * load(slope + i * ld + j);
    store(d + i * ld + j, value);
    return value;
  };
  for (int64_t i = 0; i < n; i += 2)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const bool two = i + 1 < n;
      const Vec first = one(i, j), second = two ? one(i + 1, j) : Vec{};
      store(sums + j, load(sums + j) + first + second);
      if (!packs<T>(ld)) continue;
      uint32_t* there = to + j / kPanel * kPanel * steps + i / kWord<T> * kPanel + j % kPanel;
      if constexpr (sizeof(T) == 2) {
        store_as(there, pair_up(first, second));
      } else {
        store_as(there, first);
        if (two) store_as(there + kPanel, second);
      }
    }
  if (packs<T>(ld)) return {to, steps * kPanel, kPanel};
  return {reinterpret_cast<const uint32_t*>(d), kPanel, ld};
}

template <typename T, typename W>
void backward(
    const Tensor& dy, const Tensor& x, const Tensor& offsets, const Tensor& w1, const Tensor& w2, const Tensor& kept_h,
    const Optional& kept_slope, const Tensor& d_pre, const Optional& dx, const Optional& dw1, const Optional& db1,
    const Optional& dw2, const Optional& db2) {
  const int64_t R = x.size(0), E = w1.size(0), M = w1.size(1), N = w1.size(2), F = w2.size(1), gates = N / F;
  const auto* o = data<int32_t>(offsets);
  const auto *DY = data<T>(dy), *X = data<T>(x), *H = data<T>(kept_h), *S = data<T>(kept_slope);
  const auto *W1 = data<W>(w1), *W2 = data<W>(w2);
  auto *D = data<T>(d_pre), *DX = data<T>(dx);
  auto *DW1 = data<W>(dw1), *DB1 = data<W>(db1), *DW2 = data<W>(dw2), *DB2 = data<W>(db2);

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
      if (DB1) std::memset(DB1 + e * N, 0, N * sizeof(W));
      if (DB2) std::memset(DB2 + e * M, 0, M * sizeof(W));
      fence();
      return;
    }
    const bool several = o[e + 1] - o[e] > kDeep;
    auto& scratch = Scratch::of_thread();
    const int64_t turned = sizeof(T) == 2 ? kDeep / 2 : 0;  // words of a column of the rows, which float reads in place
    const int64_t packed_dy = packs<T>(M) ? panel_words<T>(kDeep, M) : 0;
    const int64_t packed_d = packs<T>(N) ? panel_words<T>(kDeep, columns) : 0;
    const int64_t tile = turned * (M + columns) + packed_dy + packed_d;
    const int64_t sums = several ? M * columns * (gates + 1) : 0;
    scratch.reserve(
        (panel_words<T>(M, columns) + tile + kDeep * columns + gates * columns + M + sums) * sizeof(float));
    auto* to = scratch.take<uint32_t>(panel_words<T>(M, columns));
    auto* x_words = scratch.take<uint32_t>(turned * M);
    auto* h_words = scratch.take<uint32_t>(turned * columns);
    auto* dy_words = scratch.take<uint32_t>(packed_dy);
    auto* d_words = scratch.take<uint32_t>(packed_d);
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
    fence();
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
  std::memset(DX + o[E] * M, 0, (R - o[E]) * M * sizeof(T));
}

void experts_forward(
    const Tensor& x, const Tensor& offsets, const Tensor& w1, const Optional& b1, const Tensor& w2, const Optional& b2,
    int64_t activation, const Tensor& y, const Optional& h, const Optional& slope) {
  const auto call = is_float(x) ? forward<float, float>
      : is_float(w1)            ? forward<BFloat16, float>
                                : forward<BFloat16, BFloat16>;
  call(x, offsets, w1, b1, w2, b2, activation, y, h, slope);
}

void experts_backward(
    const Tensor& dy, const Tensor& x, const Tensor& offsets, const Tensor& w1, const Tensor& w2, const Tensor& h,
    const Optional& slope, const Tensor& d_pre, const Optional& dx, const Optional& dw1, const Optional& db1,
    const Optional& dw2, const Optional& db2) {
  const auto call = is_float(x) ? backward<float, float>
      : is_float(w1)            ? backward<BFloat16, float>
                                : backward<BFloat16, BFloat16>;
  call(dy, x, offsets, w1, w2, h, slope, d_pre, dx, dw1, db1, dw2, db2);
}

// Compute y from x with matrices that were packed once. A task is one expert, some of its rows and some panels, because
// in a decoding step few experts have rows, and few of them.
template <typename T>
void packed_forward(
    const Tensor& x, const Tensor& offsets, const Tensor& up, const Optional& up_bias, const Tensor& down,
    const Optional& down_bias, int64_t F, int64_t activation, const Tensor& y) {
  const int64_t R = x.size(0), M = x.size(1), E = down.size(0), gates = up.size(0) / E;
  const auto* o = data<int32_t>(offsets);
  const auto *X = data<T>(x), *B1 = data<T>(up_bias), *B2 = data<T>(down_bias);
  auto h = empty(x, {R, F});
  auto *H = data<T>(h), *Y = data<T>(y);
  const Packed<T> w1(data<T>(up), gates, M, F), w2(data<T>(down), 1, F, M);
  struct Piece { int64_t expert, row, rows, first, last; };
  const auto pieces = [&](int64_t panels) {
    std::vector<Piece> found;
    const int64_t busy = std::count_if(o, o + E, [](const int32_t& first) { return (&first)[1] > first; });
    const int64_t step = panels_of_task(panels * busy);
    for (const auto& part : row_parts(o, E, kPackedRows))
      for (int64_t p = 0; p < panels; p += step)
        found.push_back({part.expert, part.first, part.last - part.first, p, std::min(p + step, panels)});
    return found;
  };
  share(pieces(w1.panels), [&](const Piece& piece, const Piece* next) {
    const T* bias = B1 ? B1 + piece.expert * gates * F : nullptr;
    const T* after = next ? w1.of(next->expert).panel(0, next->first) : w2.of(piece.expert).panel(0, 0);
    layer(X + piece.row * M, piece.rows, w1.of(piece.expert), piece.first, piece.last, after, bias, activation,
          [&](int64_t i, int64_t j, Vec v, auto... n) { store(H + (piece.row + i) * F + j, v, n...); });
  });
  share(pieces(w2.panels), [&](const Piece& piece, const Piece* next) {
    const T* bias = B2 ? B2 + piece.expert * M : nullptr;
    const T* after = next ? w2.of(next->expert).panel(0, next->first) : nullptr;
    layer(H + piece.row * F, piece.rows, w2.of(piece.expert), piece.first, piece.last, after, bias, kNone,
          [&](int64_t i, int64_t j, Vec v, auto... n) { store(Y + (piece.row + i) * M + j, v, n...); });
  });
  std::memset(Y + o[E] * M, 0, (R - o[E]) * M * sizeof(T));
}

Tensor packed_experts(
    const Tensor& x, const Tensor& offsets, const Tensor& up, const Optional& up_bias, const Tensor& down,
    const Optional& down_bias, int64_t F, int64_t activation) {
  const int64_t R = x.size(0), M = x.size(1), E = offsets.numel() - 1, gates = activation == kSwiglu ? 2 : 1;
  const auto* o = data<int32_t>(offsets);
  check(
      up.size(0) == gates * E && up.size(1) == panels_of(F) && up.size(2) == M && down.size(0) == E &&
          down.size(1) == panels_of(M) && down.size(2) == F && o[0] == 0 && std::is_sorted(o, o + E + 1) && o[E] <= R &&
          (!up_bias.has_value() || up_bias->numel() == gates * E * F) &&
          (!down_bias.has_value() || down_bias->numel() == E * M),
      "expert_ffn: packed weights of ", E, " experts of ", M, " and ", F, " do not fit the rows");
  check(
      same_dtype(x, up, up_bias, down, down_bias) && contiguous(x, up, up_bias, down, down_bias),
      "expert_ffn: rows and packed weights must be contiguous, all float32 or all bfloat16");
  auto y = empty_rows(x, x.size(1));
  const auto call = is_float(x) ? packed_forward<float> : packed_forward<BFloat16>;
  call(x, offsets, up, up_bias, down, down_bias, F, activation, y);
  return y;
}

}  // namespace

// Return each token's weighted sum of its experts' outputs, with `add` added: what row table, dispatch, experts and
// combine compute one by one, in one call.
Tensor routed_experts(
    const Tensor& x, const Tensor& expert, const Tensor& slot, const Tensor& kept, const Tensor& weight,
    const Tensor& up, const Optional& up_bias, const Tensor& down, const Optional& down_bias, int64_t F,
    int64_t activation, const Optional& add) {
  check(
      same_dtype(x, add) && is_float(weight) && contiguous(x, weight, add) && x.size(0) == slot.size(0) &&
          (!add.has_value() || add->numel() == x.numel()) && weight.numel() == slot.numel(),
      "routed_experts: tokens must be contiguous float32 or bfloat16 and fit the gate, also those that are added");
  const auto table = make_table(expert, slot, kept, std::nullopt);
  auto rows = empty(x, {table.entry.numel(), x.size(1)});
  dispatch(x, table.entry, slot.size(1), rows);
  rows = packed_experts(rows, table.offsets, up, up_bias, down, down_bias, F, activation);
  auto y = empty_rows(x, x.size(1));
  sum_rows(rows, table.row, weight, add, y);
  return y;
}

}  // namespace moelab

STABLE_TORCH_LIBRARY_FRAGMENT(MOELAB_OPERATIONS, library) {
  library.def(
      "experts_forward(Tensor x, Tensor offsets, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int activation, "
      "Tensor(a!) y, Tensor(b!)? h, Tensor(c!)? slope) -> ()");
  library.def(
      "experts_backward(Tensor dy, Tensor x, Tensor offsets, Tensor w1, Tensor w2, Tensor h, Tensor? slope, "
      "Tensor(a!) d_pre, Tensor(b!)? dx, Tensor(c!)? dw1, Tensor(d!)? db1, Tensor(e!)? dw2, Tensor(f!)? db2) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MOELAB_OPERATIONS, CPU, library) {
  library.impl("experts_forward", TORCH_BOX(&moelab::experts_forward));
  library.impl("experts_backward", TORCH_BOX(&moelab::experts_backward));
}
