// The mix of a token's routed expert and its fixed MLP, and its gradient; kernels/residual.py describes the operation.
//
// A task is kBlock tokens. Sums over tokens are taken within a block first, then over the blocks in order, so that a
// result has the same bits on any number of threads.
#include "activations.h"
#include "decode.h"

namespace moelab {
namespace {

constexpr int64_t kBlock = 128;

// A logit from which on a_1 is computed as a sigmoid, too: 1 - a_0 has three digits there, and none from 17 on. Below it
// stays, because another rounding would give published runs other bits.
constexpr float kSure = 8.f;

inline int64_t blocks_of(int64_t S) { return (S + kBlock - 1) / kBlock; }

// Return the sum of add(j, ...) over a row's vectors.
template <typename Add>
inline float sum_of_row(int64_t M, const Add& add) {
  Vec total{};
  each_vector(M, [&](int64_t j, auto... n) { total = add(total, j, n...); });
  return sum(total);
}

// y = a_0 moe + a_1 mlp + add, where a_0 = sigmoid(logit), logit = x . difference + bias, and a_1 = sigmoid(-logit) are
// written to a [S, 2], if there is one.
template <typename T>
void mix_as(
    const Tensor& moe, const Tensor& mlp, const Optional& a, const Tensor& x, const Tensor& difference, double bias,
    const Optional& add, const Tensor& y) {
  const int64_t S = moe.size(0), M = moe.size(1);
  const auto *E = data<T>(moe), *P = data<T>(mlp), *X = data<T>(x), *added = data<T>(add);
  const auto* W = data<float>(difference);
  auto* A = data<float>(a);
  auto* Y = data<T>(y);
  parallel(blocks_of(S), 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first * kBlock; s < std::min(last * kBlock, S); ++s) {
      const float dot = sum_of_row(M, [&](Vec total, int64_t j, auto... n) {
        return fma(load(X + s * M + j, n...), load(W + j, n...), total);
      });
      const float logit = dot + float(bias), a_0 = sigmoid(all(logit))[0];
      const float both[2] = {a_0, logit > kSure ? sigmoid(all(-logit))[0] : 1.f - a_0};
      if (A) std::copy_n(both, 2, A + 2 * s);
      each_vector(M, [&](int64_t j, auto... n) {
        const Vec routed = load(E + s * M + j, n...) * both[0];
        Vec v = fma(load(P + s * M + j, n...), all(both[1]), routed);
        if (added) v = v + load(added + s * M + j, n...);
        store(Y + s * M + j, v, n...);
      });
    }
  });
}

// The gradients of both branches, of x, of the difference [M] and, after these, of the bias.
template <typename T>
void mix_backward_as(
    const Tensor& dy, const Tensor& moe, const Tensor& mlp, const Tensor& a, const Tensor& x, const Tensor& difference,
    const Tensor& d_moe, const Tensor& d_mlp, const Tensor& d_x, const Tensor& d_difference) {
  const int64_t S = moe.size(0), M = moe.size(1), blocks = blocks_of(S);
  const auto *DY = data<T>(dy), *E = data<T>(moe), *P = data<T>(mlp), *X = data<T>(x);
  const auto *A = data<float>(a), *W = data<float>(difference);
  auto *DE = data<T>(d_moe), *DP = data<T>(d_mlp), *DX = data<T>(d_x);
  auto* DW = data<float>(d_difference);
  std::vector<float> sums(blocks * (M + 1), 0.f);
  parallel(blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first * kBlock; s < std::min(last * kBlock, S); ++s) {
      Vec dots[2] = {Vec{}, Vec{}};
      each_vector(M, [&](int64_t j, auto... n) {
        const int64_t at = s * M + j;
        const Vec d = load(DY + at, n...);
        dots[0] = fma(d, load(E + at, n...), dots[0]);
        dots[1] = fma(d, load(P + at, n...), dots[1]);
        store(DE + at, d * A[2 * s], n...);
        store(DP + at, d * A[2 * s + 1], n...);
      });
      const float d = A[2 * s] * A[2 * s + 1] * (sum(dots[0]) - sum(dots[1]));
      float* own = sums.data() + s / kBlock * (M + 1);
      each_vector(M, [&](int64_t j, auto... n) {
        store(own + j, fma(load(X + s * M + j, n...), all(d), load(own + j, n...)), n...);
        store(DX + s * M + j, load(W + j, n...) * d, n...);
      });
      own[M] += d;
    }
  });
  std::fill_n(DW, M + 1, 0.f);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t j = 0; j <= M; ++j) DW[j] += sums[b * (M + 1) + j];
}

}  // namespace

Tensor mix(
    const Tensor& moe, const Tensor& mlp, const Optional& a, const Tensor& x, const Tensor& difference, double bias,
    const Optional& add) {
  check(
      same_dtype(moe, mlp, x, add) && contiguous(moe, mlp, a, x, difference, add),
      "residual_mix: tensors must be contiguous, all float32 or all bfloat16");
  const int64_t S = moe.size(0), M = moe.size(1);
  const auto has = [](const Optional& t, int64_t n) { return !t.has_value() || t->numel() == n; };
  check(
      moe.dim() == 2 && has(mlp, S * M) && has(x, S * M) && has(difference, M) && has(add, S * M) && has(a, 2 * S),
      "residual_mix: tensors do not fit branches [", S, ", ", M, "]");
  auto y = empty_rows(moe, M);
  (is_float(moe) ? mix_as<float> : mix_as<BFloat16>)(moe, mlp, a, x, difference, bias, add, y);
  return y;
}

namespace {

void mix_backward(
    const Tensor& dy, const Tensor& moe, const Tensor& mlp, const Tensor& a, const Tensor& x, const Tensor& difference,
    const Tensor& d_moe, const Tensor& d_mlp, const Tensor& d_x, const Tensor& d_difference) {
  const auto call = is_float(moe) ? mix_backward_as<float> : mix_backward_as<BFloat16>;
  call(dy, moe, mlp, a, x, difference, d_moe, d_mlp, d_x, d_difference);
}

}  // namespace
}  // namespace moelab

STABLE_TORCH_LIBRARY_FRAGMENT(MOELAB_OPERATIONS, library) {
  library.def(
      "mix(Tensor moe, Tensor mlp, Tensor(a!)? a, Tensor x, Tensor difference, float bias, Tensor? add) -> Tensor");
  library.def(
      "mix_backward(Tensor dy, Tensor moe, Tensor mlp, Tensor a, Tensor x, Tensor difference, Tensor(a!) d_moe, "
      "Tensor(b!) d_mlp, Tensor(c!) d_x, Tensor(d!) d_difference) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MOELAB_OPERATIONS, CPU, library) {
  library.impl("mix", TORCH_BOX(&moelab::mix));
  library.impl("mix_backward", TORCH_BOX(&moelab::mix_backward));
}
