// The attention of new tokens over cached keys and values (kernels/decode.py describes it), and that of whole short
// sequences with its gradient (kernels/attention.py).
//
// A task is one sequence's head, or group of heads that share keys and values, so that a result has the same bits in any
// batch and on any number of threads.
#include <cmath>
#include <limits>

#include "decode.h"
#include "products.h"

namespace moelab {
namespace {

constexpr int64_t kHeadSize = 512;  // at most; LARGEST_HEAD in kernels/decode.py
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

// Turn the halves of a row [D] against each other by angles whose cosines and sines are given, [D / 2].
template <typename T>
void rotate(T* x, const float* cosines, const float* sines, int64_t D) {
  each_vector(D / 2, [&](int64_t d, auto... n) {
    T* other = x + D / 2;
    const Vec first = load(x + d, n...), second = load(other + d, n...);
    const Vec c = load(cosines + d, n...), s = load(sines + d, n...);
    store(x + d, first * c - second * s, n...);
    store(other + d, second * c + first * s, n...);
  });
}

// x = x + share (before - x) of rows [D].
template <typename T>
void smear(T* x, const T* before, float share, int64_t D) {
  for (int64_t d = 0; d < D; d += kLanes) {
    const Vec own = load(x + d);
    store(x + d, fma(load(before + d) - own, all(share), own));
  }
}

template <typename T>
struct Attends {
  const Heads& heads;
  const Sequences& sequences;
  const Cached& cached;
  T* qkv;
  int64_t layer, width = (heads.queries + 2 * heads.keys) * heads.size;
  const T *q_norm = data<T>(heads.q_norm), *k_norm = data<T>(heads.k_norm);

  // The cached row at a place of a sequence: of keys, or of values.
  T* row(const Tensor& cache, int64_t sequence, int64_t head, int64_t place) const {
    const int64_t slot = sequences.slot[sequence], slots = cache.size(1), length = cache.size(3);
    return data<T>(cache) + (((layer * slots + slot) * heads.keys + head) * length + place) * heads.size;
  }
  void turn(T* x, int64_t place) const {
    const int64_t half = heads.size / 2;
    if (heads.angles.has_value()) {
      const float* angles = data<float>(*heads.angles) + place * heads.size;
      rotate(x, angles, angles + half, heads.size);
    }
  }
  // Write the new keys and values of one head of a sequence to the cache.
  void remember(int64_t sequence, int64_t head) const {
    const int64_t D = heads.size, first = sequences.first(sequence), n = sequences.count[sequence];
    alignas(64) T newest[kHeadSize];
    const auto key = [&](int64_t i) { return qkv + (first + i) * width + (heads.queries + head) * D; };
    for (int64_t i = 0; i < n && heads.norm == kOfHead; ++i) rms_norm(key(i), k_norm, heads.eps, D, key(i));
    if (heads.shares.has_value()) {
      const int64_t slots = cached.last->size(1);
      T* last = data<T>(*cached.last) + ((layer * slots + sequences.slot[sequence]) * heads.keys + head) * D;
      std::copy_n(key(n - 1), D, newest);
      for (int64_t i = n - 1; i >= 0; --i)  // backwards, as each needs the one before it as it was
        if (i > 0 || sequences.start[sequence] > 0)
          smear(key(i), i > 0 ? key(i - 1) : last, data<float>(*heads.shares)[head], D);
      std::copy_n(newest, D, last);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = sequences.start[sequence] + i;
      turn(key(i), place);
      std::copy_n(key(i), D, row(cached.keys, sequence, head, place));
      std::copy_n(key(i) + heads.keys * D, D, row(cached.values, sequence, head, place));
    }
  }
  // Attend from each new token of a sequence, by the query heads that share one head of keys.
  void attend(int64_t sequence, int64_t head, const T* next, float* p, T* y) const {
    const int64_t D = heads.size, H = heads.queries, N = heads.keys;
    const T *keys = row(cached.keys, sequence, head, 0), *values = row(cached.values, sequence, head, 0);
    for (int64_t i = 0; i < sequences.count[sequence]; ++i) {
      const int64_t r = sequences.first(sequence) + i, place = sequences.start[sequence] + i;
      for (int64_t h = head * H / N; h < (head + 1) * H / N; ++h) {
        T* q = qkv + r * width + h * D;
        if (heads.norm == kOfHead) rms_norm(q, q_norm, heads.eps, D, q);
        turn(q, place);
        attend_head(q, keys, values, i + 1 < sequences.count[sequence] ? keys : next, place + 1, D, p, y + (r * H + h) * D);
      }
    }
  }
  void all(T* y) const {
    const int64_t B = sequences.slot.size(), N = heads.keys, D = heads.size, length = cached.keys.size(3);
    if (heads.norm == kOfAll)
      parallel(sequences.rows(), 16, [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; ++r) {
          T *q = qkv + r * width, *k = q + heads.queries * D;
          rms_norm(q, q_norm, heads.eps, heads.queries * D, q);
          rms_norm(k, k_norm, heads.eps, N * D, k);
        }
      });
    parallel(B * N, 1, [&](int64_t from, int64_t to) {
      auto& scratch = Scratch::of_thread();
      scratch.reserve(round_up(length, kLanes) * sizeof(float));
      float* p = scratch.take<float>(round_up(length, kLanes));
      for (int64_t i = from; i < to; ++i) {
        const int64_t j = std::min(i + 1, B * N - 1);
        remember(i / N, i % N);
        attend(i / N, i % N, row(cached.keys, j / N, j % N, 0), p, y);
      }
    });
  }
};

constexpr int64_t kTile = 32;  // queries of a tile, whose scores are computed up to the last one that it may see

// Queries, keys and values of one head, as they lie in qkv [B, T, 3, H, D]: rows `ld` values apart.
template <typename T>
struct Head {
  T *q, *k, *v;
  int64_t ld;
  Head(T* qkv, int64_t i, int64_t length, int64_t H, int64_t D) : ld(3 * H * D) {
    q = qkv + i / H * length * ld + i % H * D;
    k = q + H * D;
    v = k + H * D;
  }
};

// Keys that the queries of a tile from t on may see, rounded up to what products take.
inline int64_t seen(int64_t t, int64_t length) { return std::min(t + kTile, length); }

// y = softmax(q k^T / sqrt(D), causal) v of each head; p [B, H, T, T] keeps the probabilities, of which those past the
// keys that a tile may see are not written.
template <typename T>
void attention_as(const Tensor& qkv, const Tensor& p, const Tensor& y) {
  const int64_t B = qkv.size(0), length = qkv.size(1), H = qkv.size(3), D = qkv.size(4);
  const float scale = 1.f / std::sqrt(float(D));
  parallel(B * H, 1, [&](int64_t first, int64_t last) {
    auto& scratch = Scratch::of_thread();
    scratch.reserve((panel_words<T>(D, length) + panel_words<T>(length, D) + kTile * std::max(length, D)) * 4);
    auto* to_k = scratch.take<uint32_t>(panel_words<T>(D, length));
    auto* to_v = scratch.take<uint32_t>(panel_words<T>(length, D));
    auto* scores = scratch.take<float>(kTile * std::max(length, D));
    Ahead ahead;
    for (int64_t i = first; i < last; ++i) {
      const Head<const T> head(data<const T>(qkv), i, length, H, D);
      const auto k_t = panels_of_transposed<T>(head.k, head.ld, D, length, to_k);
      const auto v = panels<T>(head.v, head.ld, length, D, to_v);
      T* P = data<T>(p) + i * length * length;
      T* Y = data<T>(y) + (i / H * length * H + i % H) * D;
      for (int64_t t = 0; t < length; t += kTile) {
        const int64_t n = std::min(kTile, length - t), keys = seen(t, length);
        product<T>(n, keys, D / kWord<T>, rows(head.q + t * head.ld, head.ld), k_t, nullptr, scores,
                   target(scores, keys), ahead);
        for (int64_t r = 0; r < n; ++r) {
          float* row = scores + r * keys;
          const auto visible = [&](int64_t j) { return lanes() + all(int32_t(j)) <= all(int32_t(t + r)); };
          Vec most = all(-kInfinity), total{};
          for (int64_t j = 0; j < keys; j += kLanes) {
            const Vec score = visible(j) ? load(row + j) * scale : all(-kInfinity);
            store(row + j, score);
            most = larger(score, most);
          }
          const float shift = largest(most);
          for (int64_t j = 0; j < keys; j += kLanes) {
            const Vec e = exp_of_negative(load(row + j) - shift);
            store(row + j, visible(j) ? e : Vec{});
            total = total + load(row + j);
          }
          const float over = 1.f / sum(total);
          for (int64_t j = 0; j < keys; j += kLanes) store(P + (t + r) * length + j, load(row + j) * over);
        }
        product<T>(n, D, keys / kWord<T>, rows(P + t * length, length), v, nullptr, scores,
                   target(Y + t * H * D, H * D), ahead);
      }
    }
  });
}

// The gradient of qkv from that of y.
template <typename T>
void attention_backward_as(const Tensor& dy, const Tensor& qkv, const Tensor& p, const Tensor& d_qkv) {
  const int64_t B = qkv.size(0), length = qkv.size(1), H = qkv.size(3), D = qkv.size(4);
  const float scale = 1.f / std::sqrt(float(D));
  parallel(B * H, 1, [&](int64_t first, int64_t last) {
    auto& scratch = Scratch::of_thread();
    const int64_t panels_TD = panel_words<T>(length, D), square = length * length, wide = std::max(length, D);
    scratch.reserve((panel_words<T>(D, length) + 3 * panels_TD + 2 * square + kTile * wide + length * D) * 4);
    auto* to_v = scratch.take<uint32_t>(panel_words<T>(D, length));
    auto* to_q = scratch.take<uint32_t>(panels_TD);
    auto* to_k = scratch.take<uint32_t>(panels_TD);
    auto* to_dy = scratch.take<uint32_t>(panels_TD);
    auto* words = scratch.take<uint32_t>(square);
    auto* ds = scratch.take<T>(square);
    auto* dp = scratch.take<float>(kTile * wide);
    Ahead ahead;
    for (int64_t i = first; i < last; ++i) {
      const Head<const T> head(data<const T>(qkv), i, length, H, D);
      const Head<T> d(data<T>(d_qkv), i, length, H, D);
      const T* P = data<const T>(p) + i * length * length;
      const T* DY = data<const T>(dy) + (i / H * length * H + i % H) * D;
      const auto v_t = panels_of_transposed<T>(head.v, head.ld, D, length, to_v);
      const auto q = panels<T>(head.q, head.ld, length, D, to_q), k = panels<T>(head.k, head.ld, length, D, to_k);
      const auto dys = panels<T>(DY, H * D, length, D, to_dy);
      for (int64_t t = 0; t < length; t += kTile) {
        const int64_t n = std::min(kTile, length - t), keys = seen(t, length);
        product<T>(n, keys, D / kWord<T>, rows(DY + t * H * D, H * D), v_t, nullptr, dp, target(dp, keys), ahead);
        for (int64_t r = 0; r < n; ++r) {
          const T* own = P + (t + r) * length;
          Vec total{};
          for (int64_t j = 0; j < keys; j += kLanes) total = fma(load(own + j), load(dp + r * keys + j), total);
          const float inner = sum(total);
          for (int64_t j = 0; j < keys; j += kLanes)
            store(ds + (t + r) * length + j, load(own + j) * (load(dp + r * keys + j) - inner) * scale);
        }
        product<T>(n, D, keys / kWord<T>, rows(ds + t * length, length), k, nullptr, dp,
                   target(d.q + t * d.ld, d.ld), ahead);
      }
      // Of keys and values, tile by tile: the sums are over the queries that see them.
      for (int64_t t = 0; t < length; t += kTile) {
        const int64_t n = std::min(kTile, length - t), queries = length - t, steps = (queries + kWord<T> - 1) / kWord<T>;
        const auto of = [&](const T* square) { return transposed(square + t * length + t, length, queries, n, words); };
        product<T>(n, D, steps, of(P), dys.from(t / kWord<T>), nullptr, dp, target(d.v + t * d.ld, d.ld), ahead);
        product<T>(n, D, steps, of(ds), q.from(t / kWord<T>), nullptr, dp, target(d.k + t * d.ld, d.ld), ahead);
      }
    }
  });
}

void check_attention(const Tensor& qkv, const Tensor& y, const Tensor& p) {
  const int64_t length = qkv.size(1), D = qkv.size(4);
  check(
      qkv.dim() == 5 && qkv.size(2) == 3 && length % kMultiple == 0 && D % kMultiple == 0 && 3 * y.numel() == qkv.numel() &&
          p.numel() == qkv.size(0) * qkv.size(3) * length * length && qkv.is_contiguous() && y.is_contiguous() &&
          p.is_contiguous() && y.scalar_type() == qkv.scalar_type() && p.scalar_type() == qkv.scalar_type(),
      "attention: sequences of ", length, " tokens and heads of ", D, "; multiples of ", kMultiple, " are computed");
}

void attention(const Tensor& qkv, const Tensor& p, const Tensor& y) {
  check_attention(qkv, y, p);
  (is_float(qkv) ? attention_as<float> : attention_as<BFloat16>)(qkv, p, y);
}

void attention_backward(const Tensor& dy, const Tensor& qkv, const Tensor& p, const Tensor& d_qkv) {
  check_attention(qkv, dy, p);
  (is_float(qkv) ? attention_backward_as<float> : attention_backward_as<BFloat16>)(dy, qkv, p, d_qkv);
}

}  // namespace

Tensor attend(
    const Tensor& qkv, const Heads& heads, const Sequences& sequences, const Cached& cached, int64_t layer) {
  auto y = empty(qkv, {qkv.size(0), heads.queries * heads.size});
  if (is_float(qkv))
    Attends<float>{heads, sequences, cached, data<float>(qkv), layer}.all(data<float>(y));
  else
    Attends<BFloat16>{heads, sequences, cached, data<BFloat16>(qkv), layer}.all(data<BFloat16>(y));
  return y;
}

}  // namespace moelab

STABLE_TORCH_LIBRARY_FRAGMENT(MOELAB_OPERATIONS, library) {
  library.def("attention(Tensor qkv, Tensor(a!) p, Tensor(b!) y) -> ()");
  library.def("attention_backward(Tensor dy, Tensor qkv, Tensor p, Tensor(a!) d_qkv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MOELAB_OPERATIONS, CPU, library) {
  library.impl("attention", TORCH_BOX(&moelab::attention));
  library.impl("attention_backward", TORCH_BOX(&moelab::attention_backward));
}
