// Products, experts, norm and attention of a model whose matrices were packed once; kernels/packed.py describes the
// operations.
//
// A matrix W [N, K] is packed in panels of 32 of its rows, [K][32] or for bfloat16 [K / 2][32][2], with zeros after the
// last row. Few rows of x are multiplied at the rate at which a panel arrives from memory: while one panel is
// multiplied, the next one is fetched, which the libraries' products leave to the processor. An element is the sum of
// its products in the order of k, by the same instructions whatever the number of rows, so that a row has the same bits
// in any batch. A task is some rows and some panels, so that it has them with any number of threads.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "products.h"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace moelab {
namespace {

enum Activation { kNone, kGeluTanh, kSwiglu };

constexpr int64_t kColumns = 32;    // of a panel: two vectors
constexpr int64_t kMost = blocks<float, 2>.size();  // rows that a panel is read for at once
constexpr int64_t kTile = 64;       // rows of a task
constexpr int64_t kHeadSize = 512;  // at most; LARGEST_HEAD in kernels/packed.py

inline int64_t panels_of(int64_t N) { return (N + kColumns - 1) / kColumns; }

template <typename T>
T* pointer(const std::optional<at::Tensor>& t) {
  return t.has_value() ? t->data_ptr<T>() : nullptr;
}

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& t) {
  return t.has_value() ? std::optional(t->contiguous()) : std::nullopt;
}

template <typename T>
void pack_as(const at::Tensor& weight, const at::Tensor& packed) {
  const int64_t N = weight.size(1), K = weight.size(2), panels = packed.size(1), deep = sizeof(T) == 2 ? 2 : 1;
  const T* from = weight.data_ptr<T>();
  T* to = packed.data_ptr<T>();
  at::parallel_for(0, weight.size(0) * panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t column = p % panels * kColumns;
      for (int64_t j = 0; j < kColumns; ++j)
        for (int64_t k = 0; k < K; ++k) {
          const bool there = column + j < N;
          to[p * K * kColumns + k / deep * deep * kColumns + j * deep + k % deep] =
              there ? from[(p / panels * N + column + j) * K + k] : T(0);
        }
    }
  });
}

at::Tensor pack(const at::Tensor& weight) {
  const int64_t N = weight.size(1), K = weight.size(2);
  auto packed = at::empty({weight.size(0), panels_of(N), K, kColumns}, weight.options());
  weight.scalar_type() == at::kFloat ? pack_as<float>(weight, packed) : pack_as<BFloat16>(weight, packed);
  return packed;
}

// Matrices [K, N] side by side ("gates"), in panels.
template <typename T>
struct Packed {
  const T* data;
  int64_t gates, K, N, panels;
  Packed(const T* data, int64_t gates, int64_t K, int64_t N)
      : data(data), gates(gates), K(K), N(N), panels(panels_of(N)) {}
  int64_t size() const { return gates * panels * K * kColumns; }
  const T* panel(int64_t gate, int64_t p) const { return data + (gate * panels + p) * K * kColumns; }
  // C [m, 32] = x [m, K] @ a panel, while memory reads `next`, a panel or null.
  void multiply(const T* x, int64_t ld, int64_t m, const T* b, float* c, const T* next) const {
    const auto* first = reinterpret_cast<const char*>(next);
    const int64_t passes = (m + kMost - 1) / kMost;
    Ahead ahead{first, next ? first + K * kColumns * sizeof(T) : nullptr, int64_t(kColumns * sizeof(float)) / passes};
    column<T, 2>(
        m, K / kWord<T>, rows(x, ld), reinterpret_cast<const uint32_t*>(b), kColumns, nullptr, 0, target(c, kColumns),
        ahead);
  }
};

// act(x @ W + bias) of some rows and panels; `write(row, column, mask, vector)` takes 16 columns at a time.
template <typename T, typename Write>
void layer(
    const T* x, int64_t ld, int64_t m, const Packed<T>& w, int64_t first, int64_t last, const T* bias,
    Activation activation, const Write& write) {
  alignas(64) float c[kTile * kColumns], up[kTile * kColumns];
  for (int64_t p = first; p < last; ++p) {
    const T* next = p + 1 < last ? w.panel(0, p + 1) : nullptr;
    w.multiply(x, ld, m, w.panel(0, p), c, activation == kSwiglu ? w.panel(1, p) : next);
    if (activation == kSwiglu) w.multiply(x, ld, m, w.panel(1, p), up, next);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < kColumns && p * kColumns + j < w.N; j += kLanes) {
        const int64_t column = p * kColumns + j;
        const __mmask16 mask = inside(column, w.N);
        Vec v = load(c + i * kColumns + j);
        if (bias) v = v + load(bias + column, mask);
        if (activation == kGeluTanh) v = gelu_tanh(v).value;
        if (activation == kSwiglu) {
          Vec u = load(up + i * kColumns + j);
          if (bias) u = u + load(bias + w.N + column, mask);
          v = silu(v).value * u;
        }
        write(i, column, mask, v);
      }
  }
}

struct Part {
  int64_t group, row, rows, first, last;  // panels first to last
};

// Return how many panels a task has, where there are `panels` in all: several tasks for each thread.
inline int64_t panels_of_task(int64_t panels) {
  return std::clamp<int64_t>(panels / (4 * at::get_num_threads()), 1, 16);
}

template <typename T>
void linear_as(
    const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias, bool gelu,
    const std::optional<at::Tensor>& add, const at::Tensor& y) {
  const int64_t K = packed.size(2), R = x.numel() / K, N = y.size(-1);
  const Packed<T> w(packed.data_ptr<T>(), 1, K, N);
  const auto *X = x.data_ptr<T>(), *bias_N = pointer<T>(bias), *add_RN = pointer<T>(add);
  auto* Y = y.data_ptr<T>();
  std::vector<Part> parts;
  const int64_t step = panels_of_task(w.panels);
  for (int64_t p = 0; p < w.panels; p += step)
    for (int64_t r = 0; r < R; r += kTile)
      parts.push_back({0, r, std::min(kTile, R - r), p, std::min(p + step, w.panels)});
  share(parts, [&](const Part& part) {
    layer(
        X + part.row * K, K, part.rows, w, part.first, part.last, bias_N, gelu ? kGeluTanh : kNone,
        [&](int64_t i, int64_t column, __mmask16 mask, Vec v) {
          const int64_t at = (part.row + i) * N + column;
          if (add_RN) v = v + load(add_RN + at, mask);
          store(Y + at, v, mask);
        });
  });
}

at::Tensor linear(
    const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias, int64_t N, bool gelu,
    const std::optional<at::Tensor>& add) {
  auto sizes = x.sizes().vec();
  const int64_t K = packed.size(2);
  TORCH_CHECK(!sizes.empty() && K > 0 && panels_of(N) == packed.size(1), "linear: N = ", N, " in ", packed.sizes());
  TORCH_CHECK(sizes.back() == K, "linear: x [..., ", sizes.back(), "] for a matrix [N, ", K, "]");
  TORCH_CHECK(packed.size(0) == 1, "linear: one matrix, not ", packed.size(0));
  TORCH_CHECK(!bias.has_value() || bias->numel() == N, "linear: bias ", bias->sizes(), " for N = ", N);
  sizes.back() = N;
  TORCH_CHECK(!add.has_value() || add->sizes() == sizes, "linear: add ", add->sizes(), " to ", at::IntArrayRef(sizes));
  auto y = at::empty(sizes, x.options());
  const auto call = x.scalar_type() == at::kFloat ? linear_as<float> : linear_as<BFloat16>;
  call(x.contiguous(), packed, contiguous(bias), gelu, contiguous(add), y);
  return y;
}

template <typename T>
void experts_as(
    const at::Tensor& x, const at::Tensor& expert, const at::Tensor& weight, const at::Tensor& up,
    const std::optional<at::Tensor>& up_bias, const at::Tensor& down, const std::optional<at::Tensor>& down_bias,
    int64_t F, const std::optional<at::Tensor>& add, const at::Tensor& y) {
  const int64_t S = x.size(0), M = x.size(1), K = expert.size(1), E = down.size(0), gates = up.size(0) / E;
  const auto activation = gates == 2 ? kSwiglu : kGeluTanh;
  const auto *X = x.data_ptr<T>(), *B1 = pointer<T>(up_bias), *B2 = pointer<T>(down_bias), *A = pointer<T>(add);
  const auto* chosen = expert.data_ptr<int64_t>();
  const auto* W = weight.data_ptr<float>();
  auto* Y = y.data_ptr<T>();

  // Rows in the order of experts.
  struct Group { int64_t expert, first, rows; };
  std::vector<int64_t> next(E, 0), row(S * K);
  for (int64_t i = 0; i < S * K; ++i) {
    TORCH_CHECK(0 <= chosen[i] && chosen[i] < E, "experts: no expert ", chosen[i]);
    ++next[chosen[i]];
  }
  std::vector<Group> groups;
  int64_t R = 0;
  for (int64_t e = 0; e < E; ++e) {
    if (next[e] == 0) continue;
    groups.push_back({e, R, next[e]});
    R += std::exchange(next[e], R);
  }
  for (int64_t i = 0; i < S * K; ++i) row[i] = next[chosen[i]]++;
  const auto floats = x.options().dtype(at::kFloat);
  auto xs = at::empty({R, M}, x.options()), hs = at::empty({R, F}, x.options()), ys = at::empty({R, M}, floats);
  auto *XS = xs.data_ptr<T>(), *H = hs.data_ptr<T>();
  auto* P = ys.data_ptr<float>();
  at::parallel_for(0, S * K, 256, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) std::copy_n(X + i / K * M, M, XS + row[i] * M);
  });

  const auto parts = [&](int64_t panels) {
    std::vector<Part> found;
    const int64_t step = panels_of_task(panels * groups.size());
    for (size_t g = 0; g < groups.size(); ++g)
      for (int64_t p = 0; p < panels; p += step)
        for (int64_t r = 0; r < groups[g].rows; r += kTile)
          found.push_back(
              {int64_t(g), r, std::min(kTile, groups[g].rows - r), p, std::min(p + step, panels)});
    return found;
  };
  const Packed<T> w1(up.data_ptr<T>(), gates, M, F), w2(down.data_ptr<T>(), 1, F, M);
  share(parts(w1.panels), [&](const Part& part) {
    const auto& g = groups[part.group];
    auto w = w1;
    w.data += g.expert * w.size();
    const int64_t first = g.first + part.row;
    layer(
        XS + first * M, M, part.rows, w, part.first, part.last, B1 ? B1 + g.expert * gates * F : nullptr, activation,
        [&](int64_t i, int64_t column, __mmask16 mask, Vec v) { store(H + (first + i) * F + column, v, mask); });
  });
  share(parts(w2.panels), [&](const Part& part) {
    const auto& g = groups[part.group];
    auto w = w2;
    w.data += g.expert * w.size();
    const int64_t first = g.first + part.row;
    layer(
        H + first * F, F, part.rows, w, part.first, part.last, B2 ? B2 + g.expert * M : nullptr, kNone,
        [&](int64_t i, int64_t column, __mmask16 mask, Vec v) { store(P + (first + i) * M + column, v, mask); });
  });
  at::parallel_for(0, S, 64, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s)
      for (int64_t j = 0; j < M; j += kLanes) {
        Vec sum = A ? load(A + s * M + j) : Vec(0.f);
        for (int64_t k = 0; k < K; ++k)
          sum = at::vec::fmadd(load(P + row[s * K + k] * M + j), Vec(W[s * K + k]), sum);
        store(Y + s * M + j, sum);
      }
  });
}

at::Tensor experts(
    const at::Tensor& x, const at::Tensor& expert, const at::Tensor& weight, const at::Tensor& up,
    const std::optional<at::Tensor>& up_bias, const at::Tensor& down, const std::optional<at::Tensor>& down_bias,
    int64_t F, const std::optional<at::Tensor>& add) {
  const int64_t S = x.size(0), M = x.size(1), E = down.size(0);
  TORCH_CHECK(
      E > 0 && (up.size(0) == E || up.size(0) == 2 * E) && up.size(1) == panels_of(F) && up.size(2) == M &&
          down.size(1) == panels_of(M) && down.size(2) == F && expert.size(0) == S && M % kLanes == 0 &&
          expert.sizes() == weight.sizes() && (!add.has_value() || add->sizes() == x.sizes()) &&
          (!up_bias.has_value() || up_bias->numel() == up.size(0) * F) &&
          (!down_bias.has_value() || down_bias->numel() == E * M),
      "experts: x ", x.sizes(), ", expert ", expert.sizes(), ", weight ", weight.sizes(), ", up ", up.sizes(),
      ", down ", down.sizes(), " with F = ", F);
  auto y = at::empty(x.sizes(), x.options());
  const auto call = x.scalar_type() == at::kFloat ? experts_as<float> : experts_as<BFloat16>;
  call(
      x.contiguous(), expert.contiguous(), weight.contiguous(), up, contiguous(up_bias), down, contiguous(down_bias), F,
      contiguous(add), y);
  return y;
}

template <typename T>
void rms_norm_as(const at::Tensor& x, const at::Tensor& weight, float eps, const at::Tensor& y) {
  const int64_t K = weight.size(0), R = x.numel() / K;
  const auto *X = x.data_ptr<T>(), *W = weight.data_ptr<T>();
  auto* Y = y.data_ptr<T>();
  at::parallel_for(0, R, 64, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      Vec squares(0.f);
      for (int64_t k = 0; k < K; k += kLanes) {
        const Vec v = load(X + r * K + k);
        squares = at::vec::fmadd(v, v, squares);
      }
      const Vec scale(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / K + eps));
      for (int64_t k = 0; k < K; k += kLanes) store(Y + r * K + k, load(X + r * K + k) * scale * load(W + k));
    }
  });
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t K = weight.size(0);
  TORCH_CHECK(K > 0 && x.size(-1) == K && K % kLanes == 0, "rms_norm: x ", x.sizes(), ", weight ", weight.sizes());
  auto y = at::empty(x.sizes(), x.options());
  const auto call = x.scalar_type() == at::kFloat ? rms_norm_as<float> : rms_norm_as<BFloat16>;
  call(x.contiguous(), weight.contiguous(), eps, y);
  return y;
}

template <typename T>
void fetch_row(const T* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / sizeof(T)) _mm_prefetch(row + d, _MM_HINT_T0);
}

// Write the attention of one head's query q [D] over n keys and values [n, D] to y; meanwhile, memory reads `next`, the
// keys that are needed afterwards.
template <typename T>
void attend_head(
    const T* q, const T* keys, const T* values, const T* next, int64_t n, int64_t D, float* p, T* y) {
  alignas(64) float query[kHeadSize], sums[kLanes * kLanes], turned[kLanes * kLanes];
  const Vec scale(1.f / std::sqrt(float(D)));
  for (int64_t d = 0; d < D; d += kLanes) store(query + d, load(q + d) * scale);
  Vec largest(-std::numeric_limits<float>::infinity());
  for (int64_t t = 0; t < n; t += kLanes) {  // 16 keys
    const int64_t m = std::min(kLanes, n - t);
    for (int64_t i = 0; i < m; ++i) {
      fetch_row(values + (t + i) * D, D);
      Vec sum(0.f);
      for (int64_t d = 0; d < D; d += kLanes) sum = at::vec::fmadd(load(keys + (t + i) * D + d), load(query + d), sum);
      store(sums + i * kLanes, sum);
    }
    at::vec::transpose_mxn<float, 16, 16>(sums, kLanes, turned, kLanes);
    Vec score(0.f);
    for (int64_t i = 0; i < kLanes; ++i) score = score + load(turned + i * kLanes);
    score = _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), inside(t, n), score);
    largest = at::vec::maximum(largest, score);
    store(p + t, score);
  }
  const Vec most(_mm512_reduce_max_ps(largest));
  Vec total(0.f);
  for (int64_t t = 0; t < n; t += kLanes) {
    const Vec e = exp_of_negative(load(p + t) - most);
    store(p + t, e);
    total = total + Vec(_mm512_maskz_mov_ps(inside(t, n), e));
  }
  const Vec over(1.f / _mm512_reduce_add_ps(total));
  for (int64_t d = 0; d < D; d += 4 * kLanes) {
    const int64_t m = std::min<int64_t>(4, (D - d) / kLanes);
    Vec sum[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
    for (int64_t t = 0; t < n; ++t) {
      const Vec weight(p[t]);
      if (d == 0) fetch_row(next + t * D, D);
      if (m == 4)
        for (int64_t i = 0; i < 4; ++i) sum[i] = at::vec::fmadd(load(values + t * D + d + i * kLanes), weight, sum[i]);
      else
        for (int64_t i = 0; i < m; ++i) sum[i] = at::vec::fmadd(load(values + t * D + d + i * kLanes), weight, sum[i]);
    }
    for (int64_t i = 0; i < m; ++i) store(y + d + i * kLanes, sum[i] * over);
  }
}

template <typename T>
void attend_as(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& keys, const at::Tensor& values,
    const at::Tensor& positions, const at::Tensor& y) {
  const int64_t B = q.size(0), H = q.size(1), D = q.size(3), N = k.size(1);
  const auto *Q = q.data_ptr<T>(), *KEY = k.data_ptr<T>(), *VALUE = v.data_ptr<T>();
  auto *KEYS = keys.data_ptr<T>(), *VALUES = values.data_ptr<T>(), *Y = y.data_ptr<T>();
  const auto* at = positions.data_ptr<int64_t>();
  const int64_t T_most = keys.size(2);
  for (int64_t b = 0; b < B; ++b)
    TORCH_CHECK(0 <= at[b] && at[b] < T_most, "attend: position ", at[b], ", allowed are 0 to ", T_most - 1);
  at::parallel_for(0, B * N, 1, [&](int64_t first, int64_t last) {
    auto& scratch = Scratch::of_thread();
    scratch.reserve(round_up(T_most, kLanes) * sizeof(float));
    float* p = scratch.take<float>(round_up(T_most, kLanes));
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / N, n = i % N;
      T *own_keys = KEYS + b * keys.stride(0) + n * keys.stride(1);
      T *own_values = VALUES + b * values.stride(0) + n * values.stride(1);
      std::copy_n(KEY + b * k.stride(0) + n * k.stride(1), D, own_keys + at[b] * D);
      std::copy_n(VALUE + b * v.stride(0) + n * v.stride(1), D, own_values + at[b] * D);
      const int64_t j = std::min(i + 1, B * N - 1);
      const T* next = KEYS + j / N * keys.stride(0) + j % N * keys.stride(1);
      for (int64_t h = n * H / N; h < (n + 1) * H / N; ++h)
        attend_head(
            Q + b * q.stride(0) + h * q.stride(1), own_keys, own_values, next, at[b] + 1, D, p, Y + (b * H + h) * D);
    }
  });
}

at::Tensor attend(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& keys, const at::Tensor& values,
    const at::Tensor& positions) {
  const int64_t B = q.size(0), N = k.size(1), D = q.size(3);
  const auto side_by_side = [&](const at::Tensor& t) { return t.size(3) == D && t.stride(3) == 1; };
  TORCH_CHECK(
      N > 0 && D % kLanes == 0 && D <= kHeadSize && q.size(2) == 1 && q.size(1) % N == 0 && k.size(0) == B && k.size(2) == 1 &&
          k.sizes() == v.sizes() && keys.sizes() == values.sizes() && keys.strides() == values.strides() &&
          keys.size(0) >= B && keys.size(1) == N && keys.stride(2) == D && positions.numel() == B &&
          positions.is_contiguous() && side_by_side(q) && side_by_side(k) && side_by_side(v) && side_by_side(keys),
      "attend: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(), ", keys ", keys.sizes(), ", values ",
      values.sizes(), ", positions ", positions.sizes());
  auto y = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  const auto call = q.scalar_type() == at::kFloat ? attend_as<float> : attend_as<BFloat16>;
  call(q, k, v, keys, values, positions, y);
  return y;
}

}  // namespace
}  // namespace moelab

TORCH_LIBRARY_FRAGMENT(moelab, library) {
  library.def("pack(Tensor weight) -> Tensor");
  library.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, int columns, bool gelu, Tensor? add) -> Tensor");
  library.def(
      "experts(Tensor x, Tensor expert, Tensor weight, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, "
      "int inner, Tensor? add) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor positions) -> Tensor");
}

TORCH_LIBRARY_IMPL(moelab, CPU, library) {
  library.impl("pack", moelab::pack);
  library.impl("linear", moelab::linear);
  library.impl("experts", moelab::experts);
  library.impl("rms_norm", moelab::rms_norm);
  library.impl("attend", moelab::attend);
}
