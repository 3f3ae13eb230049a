// The cross-entropy of the output head, the divergence from a teacher's, and their gradients, with few rows' logits in
// memory; kernels/head.py describes the operation.
//
// Rows go by groups. In a group, a task is a tile of rows, and after these some rows of the weights' gradient, which
// grows group by group, so that a result has the same bits on any number of threads.
#include <cmath>
#include <limits>

#include "operation.h"
#include "products.h"

namespace moelab {
namespace {

constexpr int64_t kTile = 32;        // rows of a task, whose float logits stay in a core's cache
constexpr int64_t kGroup = 1 << 19;  // logits of a group, whose gradients are in memory
constexpr int64_t kEntries = 256;    // rows of the weights' gradient of a task

// What a teacher says of rows of logits: its own logits (null without a teacher), and where the rows' losses go.
template <typename T>
struct Soft {
  const T* logits;
  float* losses;
  float cooling, weight;  // cooling is 1 / temperature
};

// Return weight * KL(teacher || student) of a row, and write its gradient. `p` has room for a row.
template <typename T>
float imitate(const float* student, const T* teacher, const Soft<T>& soft, float* gradient, float* p, int64_t V) {
  Vec most_q = all(-std::numeric_limits<float>::infinity()), most_p = most_q;
  for (int64_t j = 0; j < V; j += kLanes) {
    most_q = larger(load(student + j), most_q);
    most_p = larger(load(teacher + j), most_p);
  }
  const float shift_q = largest(most_q), shift_p = largest(most_p);
  Vec total_q{}, total_p{}, apart{};
  for (int64_t j = 0; j < V; j += kLanes) {
    const Vec log_q = (load(student + j) - shift_q) * soft.cooling;
    const Vec log_p = (load(teacher + j) - shift_p) * soft.cooling;
    const Vec q = exp_of_negative(log_q), weighted = exp_of_negative(log_p);
    total_q = total_q + q;
    total_p = total_p + weighted;
    apart = fma(weighted, log_p - log_q, apart);
    store(gradient + j, q);
    store(p + j, weighted);
  }
  const float all_q = sum(total_q), all_p = sum(total_p), slope = soft.weight * soft.cooling;
  for (int64_t j = 0; j < V; j += kLanes)
    store(gradient + j, load(gradient + j) * (slope / all_q) - load(p + j) * (slope / all_p));
  return soft.weight * (sum(apart) / all_p + std::log(all_q) - std::log(all_p));
}

// Write the losses of `n` rows of logits, and the logits' gradients to d unless it is null. The logits are overwritten.
// `scratch` has room for two rows where there is a teacher.
template <typename T>
void differentiate(
    float* logits, const int64_t* targets, float* losses, T* d, int64_t n, int64_t V, const Soft<T>& soft,
    float* scratch) {
  for (int64_t i = 0; i < n; ++i, logits += V) {
    if (soft.logits) soft.losses[i] = imitate(logits, soft.logits + i * V, soft, scratch, scratch + V, V);
    const float wanted = logits[targets[i]];
    Vec most = all(-std::numeric_limits<float>::infinity()), total{};
    for (int64_t j = 0; j < V; j += kLanes) most = larger(load(logits + j), most);
    const float shift = largest(most);
    for (int64_t j = 0; j < V; j += kLanes) {
      const Vec e = exp_of_negative(load(logits + j) - shift);
      total = total + e;
      store(logits + j, e);
    }
    const float all_of_them = sum(total), over = 1.f / all_of_them;
    losses[i] = std::log(all_of_them) + (shift - wanted);
    if (!d) continue;
    logits[targets[i]] -= all_of_them;  // the gradient is softmax minus one-hot
    for (int64_t j = 0; j < V; j += kLanes) {
      const Vec gradient = load(logits + j) * over;
      store(d + i * V + j, soft.logits ? gradient + load(scratch + j) : gradient);
    }
  }
}

// T: the products' type, W: the weights'.
template <typename T, typename W>
void head_as(
    const Tensor& x, const Tensor& w, const Tensor& targets, const Tensor& losses, const Optional& dx,
    const Optional& dw, const Optional& teacher, const Optional& soft_losses, double temperature, double weight) {
  const int64_t N = x.size(0), M = x.size(1), V = w.size(0);
  const auto *X = data<T>(x);
  const auto *weights = data<W>(w);
  const auto *Y = data<int64_t>(targets);
  auto *L = data<float>(losses), *DW = data<float>(dw);
  auto *DX = data<T>(dx);
  const auto* taught = data<T>(teacher);
  for (int64_t i = 0; i < N; ++i) check(0 <= Y[i] && Y[i] < V, "head: target ", Y[i], ", allowed are 0 to ", V - 1);
  if (DW) std::fill_n(DW, V * M, 0.f);

  const int64_t group = std::min(round_up(std::max(kGroup / V, kTile), kTile), N);
  const auto memory_t = ints({panel_words<T>(M, V)}), memory_w = ints({DX ? panel_words<T>(V, M) : 0});
  const auto memory_x = ints({DW ? (group + 1) / 2 * M : 0}), memory_d = empty(x, {DX || DW ? group : 0, V});
  const auto w_t = panels_of_transposed<T>(weights, M, M, V, data<uint32_t>(memory_t));
  const auto by_entry = DX ? panels<T>(weights, M, V, M, data<uint32_t>(memory_w)) : Panels{};
  auto* D = DX || DW ? data<T>(memory_d) : nullptr;
  // Call work(v, n, words, sums) for n rows of the weights' gradient from v on, whose sums [M, n] lie in dw.
  const auto entries = [&](const auto& work) {
    parallel((V + kEntries - 1) / kEntries, 1, [&](int64_t first, int64_t last) {
      auto& scratch = Scratch::of_thread();
      const int64_t most = kEntries * std::max(M, (group + 1) / 2);
      scratch.reserve(most * sizeof(uint32_t));
      auto* words = scratch.take<uint32_t>(most);
      for (int64_t v = first * kEntries; v < std::min(last * kEntries, V); v += kEntries)
        work(v, std::min(kEntries, V - v), words, DW + v * M);
    });
  };
  for (int64_t start = 0; start < N; start += group) {
    const int64_t count = std::min(group, N - start);
    const auto* own = X + start * M;
    parallel((count + kTile - 1) / kTile, 1, [&](int64_t first, int64_t last) {
      auto& scratch = Scratch::of_thread();
      scratch.reserve((kTile * (V + 2 * M) + 2 * V) * sizeof(float));
      auto *logits = scratch.take<float>(kTile * V), *row = scratch.take<float>(2 * V);
      auto *sums = scratch.take<float>(kTile * M), *part = scratch.take<float>(kTile * M);
      Ahead ahead;
      for (int64_t r = first * kTile; r < std::min(last * kTile, count); r += kTile) {
        const int64_t n = std::min(kTile, count - r), at = start + r;
        product<T>(n, V, M / kWord<T>, rows(own + r * M, M), w_t, nullptr, logits, target(logits, V), ahead);
        const Soft<T> soft{
            taught ? taught + at * V : nullptr, taught ? data<float>(soft_losses) + at : nullptr,
            float(1 / temperature), float(weight)};
        differentiate<T>(logits, Y + at, L + at, D ? D + r * V : nullptr, n, V, soft, row);
        if (!DX) continue;
        // By parts, because the target's entry is larger than all others, whose sum it would round.
        for (int64_t v = 0; v < V; v += kInner) {
          const int64_t steps = std::min(kInner, V - v) / kWord<T>;
          const auto w_part = by_entry.from(v / kWord<T>);
          product<T>(n, M, steps, rows(D + r * V + v, V), w_part, nullptr, nullptr, target(part, M), ahead);
          for (int64_t i = 0; i < n * M; i += kLanes)
            store(sums + i, v == 0 ? load(part + i) : load(sums + i) + load(part + i));
        }
        for (int64_t i = 0; i < n * M; i += kLanes) store(DX + at * M + i, load(sums + i));
      }
    });
    if (!DW) continue;
    const int64_t steps = (count + kWord<T> - 1) / kWord<T>;
    const auto x_t = transposed(own, M, count, M, data<uint32_t>(memory_x));
    entries([&](int64_t v, int64_t n, uint32_t* words, float* sums) {
      const Left d_t = transposed(D + v, V, count, n, words);  // in words that also serve as operand B
      Ahead ahead;
      product<T>(M, n, steps, x_t, {d_t.words, kPanel, d_t.step}, sums, sums, target(sums, n), ahead);
    });
  }
  if (DW)  // [M, n] becomes [n, M]
    entries([&](int64_t, int64_t n, uint32_t* words, float* sums) {
      std::memcpy(words, sums, n * M * sizeof(float));
      for (int64_t j = 0; j < n; j += kLanes)
        for (int64_t m = 0; m < M; m += kLanes) {
          Words square[kLanes];
          for (int64_t i = 0; i < kLanes; ++i) square[i] = load_as<Words>(words + (m + i) * n + j);
          transpose(square);
          for (int64_t i = 0; i < kLanes; ++i) store_as(sums + (j + i) * M + m, square[i]);
        }
    });
}

void head(
    const Tensor& x, const Tensor& w, const Tensor& targets, const Tensor& losses, const Optional& dx,
    const Optional& dw, const Optional& teacher, const Optional& soft_losses, double temperature, double weight) {
  const auto call = is_float(x) ? head_as<float, float>
      : is_float(w)             ? head_as<BFloat16, float>
                                : head_as<BFloat16, BFloat16>;
  call(x, w, targets, losses, dx, dw, teacher, soft_losses, temperature, weight);
}

}  // namespace
}  // namespace moelab

STABLE_TORCH_LIBRARY_FRAGMENT(MOELAB_OPERATIONS, library) {
  library.def(
      "head(Tensor x, Tensor w, Tensor targets, Tensor(a!) losses, Tensor(b!)? dx, Tensor(c!)? dw, Tensor? teacher, "
      "Tensor(d!)? soft_losses, float temperature, float weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MOELAB_OPERATIONS, CPU, library) {
  library.impl("head", TORCH_BOX(&moelab::head));
}
