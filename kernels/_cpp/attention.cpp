// The attention of a decoding step over cached keys and values; kernels/packed.py describes the operation.
//
// A task is one sequence's group of heads that share keys and values, so that a result has the same bits in any batch and
// on any number of threads.
#include <cmath>
#include <limits>

#include "operation.h"
#include "products.h"

namespace moelab {
namespace {

constexpr int64_t kHeadSize = 512;  // at most; LARGEST_HEAD in kernels/packed.py
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
void fetch_row(const T* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

// Write the attention of one head's query q [D] over n keys and values [n, D] to y; meanwhile, memory reads `next`, the
// keys that are needed afterwards. p has room for n probabilities, rounded up to a vector.
template <typename T>
void attend_head(const T* q, const T* keys, const T* values, const T* next, int64_t n, int64_t D, float* p, T* y) {
  alignas(64) float query[kHeadSize];
  const float scale = 1.f / std::sqrt(float(D));
  for (int64_t d = 0; d < D; d += kLanes) store(query + d, load(q + d) * scale);
  Vec most = all(-kInfinity);
  for (int64_t t = 0; t < n; t += kLanes) {  // a vector of keys
    const int64_t m = std::min(kLanes, n - t);
    Vec sums[kLanes]{};
    for (int64_t i = 0; i < m; ++i) {
      fetch_row(values + (t + i) * D, D);
      Vec sum{};
      for (int64_t d = 0; d < D; d += kLanes) sum = fma(load(keys + (t + i) * D + d), load(query + d), sum);
      sums[i] = sum;
    }
    transpose(sums);
    Vec score{};
    for (int64_t i = 0; i < kLanes; ++i) score = score + sums[i];
    score = lanes() < all(int32_t(m)) ? score : all(-kInfinity);
    most = larger(most, score);
    store(p + t, score);
  }
  const float shift = largest(most);
  Vec total{};
  for (int64_t t = 0; t < n; t += kLanes) {
    const Vec e = exp_of_negative(load(p + t) - shift);  // 0 past the last key
    store(p + t, e);
    total = total + e;
  }
  const float over = 1.f / sum(total);
  for (int64_t d = 0; d < D; d += 4 * kLanes) {
    const int64_t m = std::min<int64_t>(4, (D - d) / kLanes);
    Vec sum[4] = {};
    for (int64_t t = 0; t < n; ++t) {
      const Vec weight = all(p[t]);
      if (d == 0) fetch_row(next + t * D, D);
      if (m == 4)
        for (int64_t i = 0; i < 4; ++i) sum[i] = fma(load(values + t * D + d + i * kLanes), weight, sum[i]);
      else
        for (int64_t i = 0; i < m; ++i) sum[i] = fma(load(values + t * D + d + i * kLanes), weight, sum[i]);
    }
    for (int64_t i = 0; i < m; ++i) store(y + d + i * kLanes, sum[i] * over);
  }
}

template <typename T>
void attend_as(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values,
    const Tensor& positions, const Tensor& y) {
  const int64_t B = q.size(0), H = q.size(1), D = q.size(3), N = k.size(1), longest = keys.size(2);
  const auto *Q = data<T>(q), *KEY = data<T>(k), *VALUE = data<T>(v);
  auto *KEYS = data<T>(keys), *VALUES = data<T>(values), *Y = data<T>(y);
  const auto* at = data<int64_t>(positions);
  const auto row = [](const Tensor& t, int64_t i, int64_t j) { return i * t.stride(0) + j * t.stride(1); };
  for (int64_t b = 0; b < B; ++b)
    check(0 <= at[b] && at[b] < longest, "attend: position ", at[b], ", allowed are 0 to ", longest - 1);
  parallel(B * N, 1, [&](int64_t first, int64_t last) {
    auto& scratch = Scratch::of_thread();
    scratch.reserve(round_up(longest, kLanes) * sizeof(float));
    float* p = scratch.take<float>(round_up(longest, kLanes));
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / N, n = i % N, j = std::min(i + 1, B * N - 1);
      T *own_keys = KEYS + row(keys, b, n), *own_values = VALUES + row(values, b, n);
      std::copy_n(KEY + row(k, b, n), D, own_keys + at[b] * D);
      std::copy_n(VALUE + row(v, b, n), D, own_values + at[b] * D);
      const T* next = KEYS + row(keys, j / N, j % N);
      for (int64_t h = n * H / N; h < (n + 1) * H / N; ++h)
        attend_head(Q + row(q, b, h), own_keys, own_values, next, at[b] + 1, D, p, Y + (b * H + h) * D);
    }
  });
}

Tensor attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values,
    const Tensor& positions) {
  const int64_t B = q.size(0), N = k.size(1), D = q.size(3);
  const auto side_by_side = [&](const Tensor& t) { return t.size(3) == D && t.stride(3) == 1; };
  const auto alike = [](const Tensor& s, const Tensor& t) { return s.sizes() == t.sizes() && s.strides() == t.strides(); };
  check(
      N > 0 && D % kMultiple == 0 && D <= kHeadSize && q.size(2) == 1 && q.size(1) % N == 0 && k.size(0) == B &&
          k.size(2) == 1 && k.sizes() == v.sizes() && alike(keys, values) && keys.size(0) >= B && keys.size(1) == N &&
          keys.stride(2) == D && positions.numel() == B && positions.is_contiguous() && side_by_side(q) &&
          side_by_side(k) && side_by_side(v) && side_by_side(keys) && same_dtype(q, k, v, keys, values) &&
          positions.scalar_type() == ScalarType::Long,
      "attend: queries [", B, ", ", q.size(1), ", 1, ", D, "], keys of ", N, " heads and the cache do not fit");
  auto y = empty(q, {B, q.size(1), 1, D});
  (is_float(q) ? attend_as<float> : attend_as<BFloat16>)(q, k, v, keys, values, positions, y);
  return y;
}

}  // namespace
}  // namespace moelab

STABLE_TORCH_LIBRARY_FRAGMENT(MOELAB_OPERATIONS, library) {
  library.def("attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor positions) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MOELAB_OPERATIONS, CPU, library) {
  library.impl("attend", TORCH_BOX(&moelab::attend));
}
