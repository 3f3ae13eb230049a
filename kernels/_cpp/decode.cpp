// A decoding step, or prompts, in one call; kernels/decode.py describes the operation.
//
// One thread computes one part after the other, by the functions of the other operations; the others, which are started
// once, take pieces of their loops. A token's result does not depend on the other sequences.
#include "decode.h"

#include <chrono>
#include <limits>

#include "activations.h"

namespace moelab {
namespace {

// As the fields of PackedLayer, and before the layers those of PackedModel.
enum LayerWeight {
  kAttentionNorm, kAttentionNormBias, kQkv, kQkvBias, kQNorm, kKNorm, kShares, kOut, kOutBias, kNorm, kNormBias, kRouter,
  kBalance, kUp, kUpBias, kDown, kDownBias, kMlpUp, kMlpUpBias, kMlpDown, kMlpDownBias, kMix, kLayerWeights
};
enum ModelWeight { kEmbedding, kPositions, kLastNorm, kLastNormBias, kHead, kModelWeights };
enum Size { kQueries, kKeys, kHeadWidth, kHeadNorm, kRms, kTopK, kNormalize, kSigmoid, kSizes };
enum LayerSize { kExperts, kActivation, kMlpActivation, kMixKind, kLayerSizes };
enum MixKind { kSum, kLearned, kSharedGate };
enum Part { kAttention, kGate, kOfExperts, kFeedForward, kOfHead, kRest, kDistinct, kGates, kClock };

using Weights = std::vector<Optional>;

// Adds up the seconds of parts.
class Clock {
 public:
  explicit Clock(double* to) : to_(to), since_(to ? now() : 0) {}
  // Book the time since the last call.
  void book(Part part) {
    if (!to_) return;
    const double time = now();
    to_[part] += time - since_;
    since_ = time;
  }
  void count(const Tensor& kept) {
    if (!to_) return;
    const auto* n = data<int32_t>(kept);
    to_[kDistinct] += double(std::count_if(n, n + kept.numel(), [](int32_t k) { return k > 0; }));
    to_[kGates] += 1;
  }

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  double* to_;
  double since_;
};

// Call work(row) for n rows, some at a time.
template <typename Work>
void each_row(int64_t n, const Work& work) {
  parallel(n, 16, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) work(r);
  });
}

template <typename T>
void layer_norm(const T* x, const T* weight, const T* bias, float eps, int64_t n, T* y) {
  Vec total{}, squares{};
  for (int64_t i = 0; i < n; i += kLanes) total = total + load(x + i);
  const float mean = sum(total) / n;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load(x + i) - mean;
    squares = fma(v, v, squares);
  }
  const float scale = 1.f / std::sqrt(sum(squares) / n + eps);
  for (int64_t i = 0; i < n; i += kLanes)
    store(y + i, fma((load(x + i) - mean) * scale, load(weight + i), load(bias + i)));
}

// Write the scores [E] of a token's logits: of each alone, or their softmax.
void score(const float* logits, int64_t E, bool alone, float* scores) {
  if (alone) return each_vector(E, [&](int64_t e, auto... n) { store(scores + e, sigmoid(load(logits + e, n...)), n...); });
  const float most = *std::max_element(logits, logits + E);
  float total = 0;
  each_vector(E, [&](int64_t e, auto... n) {
    store(scores + e, exp_of_negative(load(logits + e, n...) - most), n...);
  });
  for (int64_t e = 0; e < E; ++e) total += scores[e];
  for (int64_t e = 0; e < E; ++e) scores[e] /= total;
}

// Return the lowest place of a row's largest value, or -1 if that is infinite or any value is NaN.
template <typename T>
int64_t likeliest(const T* row, int64_t n) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  Vec most = all(-infinity);
  Ints place{}, odd{};
  int32_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec v = load(row + j);
    const Ints better = v > most;
    most = better ? v : most;
    place = better ? all(j) : place;
    odd |= v != v;
  }
  float found = -infinity;
  int64_t best = -1;
  bool nan = false;
  const auto see = [&](float x, int64_t at) {
    nan |= x != x;
    if (x > found || (x == found && at < best)) found = x, best = at;
  };
  for (int64_t i = 0; i < kLanes; ++i) nan |= odd[i] != 0, see(most[i], place[i] + i);
  for (; j < n; ++j) see(load(row + j, 1)[0], j);
  return nan || found == infinity ? -1 : best;
}

struct Step {
  const Weights& weights;
  const std::vector<int64_t>& sizes;
  const std::vector<double>& numbers;  // the norms' epsilon, then of each layer the bias of its mix
  const Sequences& sequences;
  const Cached& cached;
  const Optional& angles;
  Clock clock;

  const Optional& of_layer(int64_t layer, LayerWeight what) const {
    return weights[kModelWeights + layer * kLayerWeights + what];
  }
  int64_t of_layer(int64_t layer, LayerSize what) const { return sizes[kSizes + layer * kLayerSizes + what]; }

  template <typename T>
  Tensor norm_as(const Tensor& x, const Optional& weight, const Optional& bias) const {
    auto y = empty_rows(x, x.size(1));
    const int64_t M = x.size(1);
    const float eps = numbers[0];
    const auto *X = data<T>(x), *W = data<T>(weight), *B = data<T>(bias);
    auto* Y = data<T>(y);
    each_row(x.size(0), [&](int64_t r) {
      sizes[kRms] ? rms_norm(X + r * M, W, eps, M, Y + r * M) : layer_norm(X + r * M, W, B, eps, M, Y + r * M);
    });
    return y;
  }
  Tensor norm(const Tensor& x, const Optional& weight, const Optional& bias) const {
    return is_float(x) ? norm_as<float>(x, weight, bias) : norm_as<BFloat16>(x, weight, bias);
  }

  template <typename T>
  Tensor embed_as(const Tensor& tokens) const {
    const Tensor& table = *weights[kEmbedding];
    const int64_t M = table.size(1);
    auto x = empty(table, {tokens.numel(), M});
    const auto *rows = data<T>(table), *places = data<T>(weights[kPositions]);
    const auto* ids = data<int64_t>(tokens);
    auto* X = data<T>(x);
    for (size_t s = 0; s < sequences.slot.size(); ++s)
      for (int64_t i = 0; i < sequences.count[s]; ++i) {
        const int64_t r = sequences.first(s) + i;
        const T *row = rows + ids[r] * M, *place = places ? places + (sequences.start[s] + i) * M : nullptr;
        for (int64_t j = 0; j < M; j += kLanes) store(X + r * M + j, place ? load(row + j) + load(place + j) : load(row + j));
      }
    return x;
  }

  // The rows of the sequences' last tokens.
  Tensor last_of(const Tensor& x) const {
    const int64_t bytes = x.size(1) * x.element_size(), B = sequences.slot.size();
    auto y = empty(x, {B, x.size(1)});
    for (int64_t s = 0; s < B; ++s)
      std::memcpy(data<char>(y) + s * bytes, data<const char>(x) + (sequences.ends[s] - 1) * bytes, bytes);
    return y;
  }

  // Attention of a layer with its norm, and the sum with x.
  Tensor attention(int64_t layer, const Tensor& x) {
    const auto of = [&](LayerWeight what) -> const Optional& { return of_layer(layer, what); };
    const Heads heads{sizes[kQueries], sizes[kKeys], sizes[kHeadWidth], sizes[kHeadNorm], float(numbers[0]),
                      of(kQNorm), of(kKNorm), of(kShares), angles};
    const auto h = norm(x, of(kAttentionNorm), of(kAttentionNormBias));
    const auto qkv = linear(h, *of(kQkv), of(kQkvBias), (heads.queries + 2 * heads.keys) * heads.size, kNone, {});
    const auto y = attend(qkv, heads, sequences, cached, layer);
    return linear(y, *of(kOut), of(kOutBias), x.size(1), kNone, x);
  }

  Tensor mlp(int64_t layer, const Tensor& x, const Optional& add) const {
    const auto of = [&](LayerWeight what) -> const Optional& { return of_layer(layer, what); };
    const auto h = linear(x, *of(kMlpUp), of(kMlpUpBias), of(kMlpDown)->size(2), of_layer(layer, kMlpActivation), {});
    return linear(h, *of(kMlpDown), of(kMlpDownBias), x.size(1), kNone, add);
  }

  // The gate's results for activations x, as the router of moelab.models computes them.
  std::vector<Tensor> route(int64_t layer, const Tensor& x) const {
    const int64_t S = x.size(0), M = x.size(1), E = of_layer(layer, kExperts), K = sizes[kTopK];
    Tensor wide = x;
    if (!is_float(x)) {
      wide = floats({S, M});
      each_row(S, [&](int64_t s) {
        for (int64_t j = 0; j < M; j += kLanes) store(data<float>(wide) + s * M + j, load(data<BFloat16>(x) + s * M + j));
      });
    }
    const auto logits = linear(wide, *of_layer(layer, kRouter), {}, E, kNone, {});
    const Optional& balance = of_layer(layer, kBalance);
    const bool alone = sizes[kSigmoid];
    if (!balance.has_value() && !alone) return gate_forward(logits, {}, K, {}, {}, sizes[kNormalize], false);
    auto scores = floats({S, E}), choice = floats({S, E});
    each_row(S, [&](int64_t s) {
      float* own = data<float>(scores) + s * E;
      score(data<float>(logits) + s * E, E, alone, own);
      for (int64_t e = 0; e < E && balance.has_value(); ++e) data<float>(choice)[s * E + e] = own[e] + data<float>(balance)[e];
    });
    auto found = gate_forward(logits, balance.has_value() ? Optional(choice) : Optional(), K, {}, {}, sizes[kNormalize], false);
    if (!alone) return found;
    const auto *expert = data<int32_t>(found[0]), *slot = data<int32_t>(found[1]);
    auto* weight = data<float>(found[2]);
    for (int64_t s = 0; s < S; ++s) {
      float total = 0;
      for (int64_t i = s * K; i < (s + 1) * K; ++i)
        total += weight[i] = slot[i] < 0 ? 0.f : data<float>(scores)[s * E + expert[i]];
      for (int64_t i = s * K; i < (s + 1) * K && sizes[kNormalize]; ++i)
        weight[i] /= std::max(total, std::numeric_limits<float>::epsilon());
    }
    return found;
  }

  // routed + sigmoid(x . w) fixed + add.
  template <typename T>
  Tensor gated(const Tensor& routed, const Tensor& fixed, const Tensor& x, const Tensor& w, const Tensor& add) const {
    const int64_t M = x.size(1);
    auto y = empty_rows(x, M);
    each_row(x.size(0), [&](int64_t s) {
      const auto of = [&](const Tensor& t) { return data<T>(t) + s * M; };
      Vec dot{};
      for (int64_t j = 0; j < M; j += kLanes) dot = fma(load(of(x) + j), load(data<float>(w) + j), dot);
      const Vec share = sigmoid(all(sum(dot)));
      for (int64_t j = 0; j < M; j += kLanes)
        store(of(y) + j, fma(load(of(fixed) + j), share, load(of(routed) + j)) + load(of(add) + j));
    });
    return y;
  }

  // The MoE layer of h, and the sum with x.
  Tensor moe(int64_t layer, const Tensor& h, const Tensor& x) {
    const auto of = [&](LayerWeight what) -> const Optional& { return of_layer(layer, what); };
    const auto gate = route(layer, h);
    clock.count(gate[4]);
    clock.book(kGate);
    const bool fixed = of(kMlpUp).has_value();
    auto y = routed_experts(
        h, gate[0], gate[1], gate[4], gate[2], *of(kUp), of(kUpBias), *of(kDown), of(kDownBias), of(kDown)->size(2),
        of_layer(layer, kActivation), fixed ? Optional() : Optional(x));
    clock.book(kOfExperts);
    if (!fixed) return y;
    const auto kind = of_layer(layer, kMixKind);
    const auto beside = mlp(layer, h, kind == kSum ? Optional(y) : Optional());
    clock.book(kFeedForward);
    if (kind == kLearned) return mix(y, beside, {}, h, *of(kMix), numbers[1 + layer], x);
    if (kind == kSharedGate)
      return is_float(h) ? gated<float>(y, beside, h, *of(kMix), x) : gated<BFloat16>(y, beside, h, *of(kMix), x);
    return is_float(h) ? sum_of<float>(beside, x) : sum_of<BFloat16>(beside, x);
  }

  template <typename T>
  Tensor sum_of(const Tensor& a, const Tensor& b) const {
    auto y = empty_rows(a, a.size(1));
    const int64_t M = a.size(1);
    each_row(a.size(0), [&](int64_t s) {
      for (int64_t j = s * M; j < (s + 1) * M; j += kLanes) store(data<T>(y) + j, load(data<T>(a) + j) + load(data<T>(b) + j));
    });
    return y;
  }

  // The logits, and the likeliest token of each sequence.
  std::tuple<Tensor, Tensor> logits(const Tensor& tokens) {
    const int64_t layers = (weights.size() - kModelWeights) / kLayerWeights;
    const Tensor& table = *weights[kEmbedding];
    auto x = is_float(table) ? embed_as<float>(tokens) : embed_as<BFloat16>(tokens);
    clock.book(kRest);
    for (int64_t layer = 0; layer < layers; ++layer) {
      x = attention(layer, x);
      clock.book(kAttention);
      const auto h = norm(x, of_layer(layer, kNorm), of_layer(layer, kNormBias));
      clock.book(kRest);
      x = of_layer(layer, kRouter).has_value() ? moe(layer, h, x) : mlp(layer, h, x);
      clock.book(of_layer(layer, kRouter).has_value() ? kRest : kFeedForward);
    }
    x = norm(last_of(x), weights[kLastNorm], weights[kLastNormBias]);
    const int64_t V = table.size(0);
    const auto found = linear(x, *weights[kHead], {}, V, kNone, {});
    auto best = empty(tokens, {x.size(0)});
    each_row(x.size(0), [&](int64_t s) {
      data<int64_t>(best)[s] = is_float(found) ? likeliest(data<float>(found) + s * V, V)
                                               : likeliest(data<BFloat16>(found) + s * V, V);
    });
    clock.book(kOfHead);
    return {found, best};
  }
};

std::tuple<Tensor, Tensor> decode(
    const Tensor& tokens, std::vector<int64_t> slots, std::vector<int64_t> starts, std::vector<int64_t> counts,
    const Tensor& keys, const Tensor& values, const Optional& last, const Optional& angles, Weights weights,
    std::vector<int64_t> sizes, std::vector<double> numbers, const Optional& seconds) {
  const size_t B = slots.size(), layers = numbers.size() - 1;
  check(
      weights.size() == kModelWeights + layers * kLayerWeights && sizes.size() == kSizes + layers * kLayerSizes &&
          starts.size() == B && counts.size() == B && size_t(keys.size(0)) == layers && keys.sizes() == values.sizes() &&
          keys.size(2) == sizes[kKeys] && keys.size(4) == sizes[kHeadWidth] &&
          (!seconds.has_value() || seconds->numel() == kClock),
      "decode: weights, cache and sequences do not fit ", layers, " layers");
  check(
      same_dtype(*weights[kEmbedding], keys, values, last) && contiguous(tokens, keys, values, last, angles) &&
          tokens.scalar_type() == ScalarType::Long,
      "decode: the cache must be contiguous and of the weights' dtype, tokens int64");
  Sequences sequences{std::move(slots), std::move(starts), std::move(counts), {}};
  int64_t rows = 0;
  for (size_t s = 0; s < B; ++s) {
    const int64_t end = sequences.start[s] + sequences.count[s];
    check(0 <= sequences.slot[s] && sequences.slot[s] < keys.size(1), "decode: slot ", sequences.slot[s], " of ", keys.size(1));
    check(
        0 <= sequences.start[s] && 0 < sequences.count[s] && end <= keys.size(3), "decode: a sequence would have ", end,
        " tokens, the cache has room for ", keys.size(3));
    sequences.ends.push_back(rows += sequences.count[s]);
  }
  const int64_t* ids = data<int64_t>(tokens);
  check(rows == tokens.numel(), "decode: ", tokens.numel(), " tokens for sequences of ", rows);
  for (int64_t r = 0; r < rows; ++r)
    check(0 <= ids[r] && ids[r] < weights[kEmbedding]->size(0), "decode: token ", ids[r], " of ", weights[kEmbedding]->size(0));
  Step step{weights, sizes, numbers, sequences, {keys, values, last}, angles, Clock(data<double>(seconds))};
  std::optional<std::tuple<Tensor, Tensor>> found;
  Team::lead([&] { found = step.logits(tokens); });
  return *found;
}

}  // namespace
}  // namespace moelab

STABLE_TORCH_LIBRARY_FRAGMENT(MOELAB_OPERATIONS, library) {
  library.def(
      "decode(Tensor tokens, int[] slots, int[] starts, int[] counts, Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? last, "
      "Tensor? angles, Tensor?[] weights, int[] sizes, float[] numbers, Tensor(d!)? seconds) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MOELAB_OPERATIONS, CPU, library) { library.impl("decode", TORCH_BOX(&moelab::decode)); }
