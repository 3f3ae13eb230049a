// The gate and its gradient; kernels/gating.py describes the operation.
//
// A task is kBlock tokens, which are computed as many at a time as a vector has lanes, one vector for each expert: maxima,
// choices and sums over experts need no operations across a vector, and any number of experts fills its vectors. Sums
// over tokens are taken within a block first, then over the blocks in order, so that a result has the same bits however
// many threads share the blocks. Experts and slots are integers, and equal those of every other implementation.
// S: tokens, E: experts, K: experts per token, C: capacity.
#include <limits>

#include "decode.h"

namespace moelab {
namespace {

constexpr int64_t kBlock = 128;  // tokens of a task, a multiple of kLanes
constexpr int64_t kMost = 512;   // experts
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kEps = std::numeric_limits<float>::epsilon();

// What the backward pass needs of the softmax, each [S]: p = exp(x - largest) * over.
struct Softmax {
  float *largest, *over, *lse;
  Softmax(const Tensor& t) : largest(data<float>(t)), over(largest + t.size(1)), lse(over + t.size(1)) {}
};

// Write the first n rows of E as E vectors of tokens; past the last row, tokens are copies of it.
void by_expert(const float* rows, int64_t n, int64_t E, float* to) {
  for (int64_t j = 0; j < E; j += kLanes) {
    const int64_t some = std::min(kLanes, E - j);
    Vec square[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const float* row = rows + std::min(i, n - 1) * E;
      square[i] = some == kLanes ? load(row + j) : load(row + j, some, -kInfinity);
      __builtin_prefetch(row + kLanes * E + j);  // for the next call, because reading is not in order of addresses
    }
    transpose(square);
    for (int64_t i = 0; i < kLanes; ++i) store(to + (j + i) * kLanes, square[i]);
  }
}

// Write the first n rows of E, which are given as E vectors of tokens.
void by_token(const float* x, int64_t n, int64_t E, float* rows) {
  for (int64_t j = 0; j < E; j += kLanes) {
    const int64_t some = std::min(kLanes, E - j);
    Vec square[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) square[i] = load(x + (j + i) * kLanes);
    transpose(square);
    for (int64_t i = 0; i < n; ++i)
      some == kLanes ? store(rows + i * E + j, square[i]) : store(rows + i * E + j, square[i], some);
  }
}

// Return the sum over the experts; add(e, sum) returns a sum with e's term. Sums of 16 terms round less than a long
// one, and do not wait for each other.
template <typename Add>
Vec sum_of_experts(int64_t E, const Add& add) {
  Vec total{};
  for (int64_t from = 0; from < E; from += 16) {
    Vec sum{};
    for (int64_t e = from; e < std::min(from + 16, E); ++e) sum = add(e, sum);
    total = total + sum;
  }
  return total;
}

struct Choice { Vec value; Ints expert; };  // of a vector of tokens

// Return the largest value and its expert among those that come after the previous choice, or among all for the `first`
// one; ties go to the lower expert. -inf is a value like any other.
template <bool first>
Choice choose(const float* x, int64_t E, Choice previous) {
  Choice found{all(-kInfinity), Ints{}};
  for (int64_t e = E - 1; e >= 0; --e) {  // downwards, so that the lower one of equal experts comes last
    const Vec value = load(x + e * kLanes);
    const Ints expert = all(int32_t(e));
    auto better = value >= found.value;
    Vec candidate = value;
    if constexpr (!first) {
      const auto later = (value < previous.value) | ((value == previous.value) & (expert > previous.expert));
      better &= later;
      candidate = later ? value : all(-kInfinity);
    }
    found.expert = better ? expert : found.expert;
    found.value = larger(candidate, found.value);  // which does not wait for the comparison
  }
  return found;
}

// Write a block's experts and weights, whether each token is `fine`, and the sums of the probabilities unless they are
// null; return the sum of lse^2.
float softmax_and_experts(
    const float* logits, const float* choice, int64_t first, int64_t last, int64_t E, int64_t K, const Softmax* softmax,
    int32_t* expert, float* weight, uint8_t* fine, float* sums) {
  alignas(64) float tile[kMost * kLanes], other[kMost * kLanes], sums_of_lanes[kMost * kLanes];
  if (sums) std::fill_n(sums_of_lanes, E * kLanes, 0.f);
  Vec squares{};
  for (int64_t s = first; s < last; s += kLanes) {
    const int64_t n = std::min(kLanes, last - s);
    const auto there = lanes() < all(int32_t(n));
    by_expert(logits + s * E, n, E, tile);
    const float* decisive = tile;
    Vec most = all(-kInfinity);
    auto undefined = Ints{} != Ints{};
    if (choice) {
      by_expert(choice + s * E, n, E, other);
      decisive = other;
      for (int64_t e = 0; e < E; ++e) {
        const Vec value = load(other + e * kLanes);
        undefined |= value != value;
        most = larger(most, load(tile + e * kLanes));
      }
    }
    alignas(64) int32_t ids[kLanes];
    alignas(64) float over_of[kLanes];
    Choice chosen{};
    for (int64_t k = 0; k < K; ++k) {
      chosen = k ? choose<false>(decisive, E, chosen) : choose<true>(decisive, E, chosen);
      if (k == 0 && !choice) most = chosen.value;
      store_as(ids, chosen.expert);
      for (int64_t i = 0; i < n; ++i) expert[(s + i) * K + k] = ids[i];
    }
    const Vec total = sum_of_experts(E, [&](int64_t e, Vec sum) {
      const Vec value = exp_of_negative(load(tile + e * kLanes) - most);
      store(tile + e * kLanes, value);
      return sum + value;
    });
    const Vec over = 1.f / total, lse = most + log_of_large(total);
    undefined |= ~(abs(lse) < kInfinity);
    store(over_of, over);
    store_as(ids, undefined);
    for (int64_t i = 0; i < n; ++i) {
      fine[s + i] = !ids[i];
      for (int64_t k = 0; k < K; ++k) {
        int32_t& id = expert[(s + i) * K + k];
        if (!fine[s + i]) id = k;
        weight[(s + i) * K + k] = tile[id * kLanes + i] * over_of[i];
      }
    }
    if (!sums) continue;
    const Vec within = there ? over : Vec{};  // the copies do not count
    for (int64_t e = 0; e < E; ++e) {
      float* sum = sums_of_lanes + e * kLanes;
      store(sum, fma(load(tile + e * kLanes), within, load(sum)));
    }
    squares = there ? fma(lse, lse, squares) : squares;
    store(softmax->largest + s, most, n);
    store(softmax->over + s, over, n);
    store(softmax->lse + s, lse, n);
  }
  if (sums)
    for (int64_t e = 0; e < E; ++e) sums[e] = sum(load(sums_of_lanes + e * kLanes));
  return sum(squares);
}

inline uint32_t mix(uint32_t x) {  // as in kernels/_hash.py
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

// Return a bound below which there are exactly `count` of n different keys, which are below 2^bits. Its bits are found
// from the highest one on by vector comparisons, without a jump that depends on a key; a few suffice for random keys.
uint64_t bound(const uint64_t* keys, int64_t n, int64_t count, int64_t bits) {
  uint64_t found = 0;  // fewer than `count` keys are below it
  for (int64_t b = bits - 1; b >= 0; --b) {
    const uint64_t next = found | uint64_t(1) << b;
    int64_t below = 0;
    for (int64_t i = 0; i < n; ++i) below += keys[i] < next;
    if (below == count) return next;
    if (below < count) found = next;
  }
  return found + 1;
}

// Replace the slots, which are the entries' ranks within their experts, by those of C random entries per expert.
// count: entries of each expert, kept: where to count the kept ones.
void keep_random(
    int64_t S, int64_t E, int64_t K, int64_t C, const std::vector<int64_t>& hash, const int32_t* expert, const int32_t* count,
    int32_t* slot, int32_t* kept) {
  const int64_t N = S * K;
  int64_t bits = 32;  // of a key: falling priority, then the entry's number
  while (N >> (bits - 32)) ++bits;
  std::vector<uint64_t> memory(2 * N + E);
  uint64_t *keys = memory.data(), *of_expert = keys + N, *limit = of_expert + N;
  std::vector<int64_t> start(E + 1, 0);
  for (int64_t e = 0; e < E; ++e) start[e + 1] = start[e] + count[e];
  for (int64_t k = 0; k < K; ++k)  // keys are k-major, like the order of slots
    for (int64_t s = 0; s < S; ++s) {
      const uint32_t token = mix(uint32_t(s) ^ uint32_t(hash[0]));
      const uint32_t priority = mix((token + uint32_t(k) * 0x9E3779B9u) ^ uint32_t(hash[1]));
      keys[k * S + s] = uint64_t(~priority) << (bits - 32) | (s * K + k);
    }
  for (int64_t k = 0; k < K; ++k)
    for (int64_t s = 0; s < S; ++s)
      if (slot[s * K + k] >= 0) of_expert[start[expert[s * K + k]] + slot[s * K + k]] = keys[k * S + s];
  parallel(E, 1 + 2048 * E / N, [&](int64_t first, int64_t last) {
    for (int64_t e = first; e < last; ++e)
      limit[e] = count[e] > C ? bound(of_expert + start[e], count[e], C, bits) : ~uint64_t(0);
  });
  std::fill_n(kept, E, 0);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t s = 0; s < S; ++s) {
      const int64_t i = s * K + k, e = expert[i];
      const bool keep = slot[i] >= 0 && keys[k * S + s] < limit[e];
      slot[i] = keep ? kept[e] : -1;
      kept[e] += keep;
    }
}

}  // namespace

// Return the gate's results: experts, slots, weights, loads, kept entries. With `losses`, both follow, then what the
// backward pass needs: the softmax's numbers and the shares of first choices.
std::vector<Tensor> gate_forward(
    const Tensor& logits, const Optional& choice, int64_t K, std::optional<int64_t> capacity, std::vector<int64_t> hash,
    bool normalize, bool losses) {
  const int64_t S = logits.size(0), E = logits.size(1), blocks = (S + kBlock - 1) / kBlock;
  check(E <= kMost && K <= E && S * K < int64_t(1) << 31, "gate: too many experts or tokens");
  std::vector<Tensor> results{ints({S, K}), ints({S, K}), floats({S, K}), ints({E}), ints({E})};
  auto *chosen = data<int32_t>(results[0]), *slots = data<int32_t>(results[1]);
  auto* W = data<float>(results[2]);
  auto *load = data<int32_t>(results[3]), *kept = data<int32_t>(results[4]);
  const auto *X = data<float>(logits), *Y = data<float>(choice);
  std::optional<Softmax> softmax;
  if (losses) {
    for (auto&& more : {floats({}), floats({}), floats({3, S}), floats({E})}) results.push_back(more);
    softmax.emplace(results[7]);
  }

  std::vector<uint8_t> fine(S);
  std::vector<float> sums(losses ? blocks * E : 0), squares(blocks);
  parallel(blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      squares[b] = softmax_and_experts(
          X, Y, b * kBlock, std::min((b + 1) * kBlock, S), E, K, losses ? &*softmax : nullptr, chosen, W, fine.data(),
          losses ? &sums[b * E] : nullptr);
  });

  // Slots as without a capacity: an entry's rank within its expert, first choices first.
  std::vector<int32_t> count(E + 1, 0);  // at E: entries of tokens that are not routed
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t s = 0; s < S; ++s) {
      const int64_t i = s * K + k;
      const int32_t rank = count[fine[s] ? chosen[i] : E]++;
      slots[i] = fine[s] ? rank : -1;
    }
    if (k == 0 && losses)
      for (int64_t e = 0; e < E; ++e) data<float>(results[8])[e] = float(double(count[e]) / std::max<int64_t>(S, 1));
  }
  std::copy_n(count.data(), E, load);
  std::copy_n(count.data(), E, kept);
  const bool healthy = count[E] == 0;
  if (capacity.has_value() && *std::max_element(load, load + E) > *capacity) {
    const int64_t C = *capacity;
    if (hash.empty()) {
      for (int64_t e = 0; e < E; ++e) kept[e] = std::min<int64_t>(load[e], C);
      for (int64_t i = 0; i < S * K; ++i) slots[i] = slots[i] < C ? slots[i] : -1;
    } else {
      keep_random(S, E, K, C, hash, chosen, load, slots, kept);
    }
  }
  if (capacity.has_value() || !healthy)
    for (int64_t i = 0; i < S * K; ++i) W[i] = slots[i] < 0 ? 0.f : W[i];
  if (normalize)
    for (int64_t s = 0; s < S; ++s) {
      float total = 0;
      for (int64_t k = 0; k < K; ++k) total += W[s * K + k];
      for (int64_t k = 0; k < K; ++k) W[s * K + k] /= std::max(total, kEps);
    }
  if (!losses) return results;

  const float* share = data<float>(results[8]);
  double balance = 0, square = 0;
  for (int64_t e = 0; e < E; ++e) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += sums[b * E + e];
    balance += sum * share[e];
  }
  for (int64_t b = 0; b < blocks; ++b) square += squares[b];
  const double tokens = std::max<int64_t>(S, 1), poison = healthy ? 0. : std::numeric_limits<double>::quiet_NaN();
  *data<float>(results[5]) = float(balance * E / tokens + poison);
  *data<float>(results[6]) = float(square / tokens + poison);
  return results;
}

namespace {

// dL/dlogit = p (a_e + r_s), plus p_k q_k at the kept choices, with q = dL/dp there; r_s = 2/S dz lse_s - <p_s, a> -
// sum_k p_k q_k.
void gate_backward(
    const Tensor& logits, const Tensor& kept_softmax, const Tensor& expert, const Tensor& slot, const Tensor& share_E,
    const Optional& d_weight, const Optional& d_aux, const Optional& d_z, bool normalize, const Tensor& d_logits) {
  const int64_t S = logits.size(0), E = logits.size(1), K = expert.size(1);
  const float *X = data<float>(logits), *DW = data<float>(d_weight), *share = data<float>(share_E);
  const auto *chosen = data<int32_t>(expert), *slots = data<int32_t>(slot);
  float* D = data<float>(d_logits);
  const Softmax softmax(kept_softmax);
  std::vector<float> a(E, 0.f);
  if (d_aux.has_value())
    for (int64_t e = 0; e < E; ++e) a[e] = share[e] * (*data<float>(d_aux) * float(double(E) / S));
  const float dz = d_z.has_value() ? 2.f / S * *data<float>(d_z) : 0.f;
  parallel((S + kBlock - 1) / kBlock, 1, [&](int64_t from, int64_t to) {
    alignas(64) float p[kMost * kLanes], direct[kMost * kLanes];  // direct: p_k q_k
    alignas(64) float d_of[kLanes]{};
    for (int64_t s = from * kBlock; s < std::min(to * kBlock, S); s += kLanes) {
      const int64_t n = std::min(kLanes, S - s);
      const Vec most = load(softmax.largest + s, n), over = load(softmax.over + s, n);
      by_expert(X + s * E, n, E, p);
      const Vec dot = sum_of_experts(E, [&](int64_t e, Vec sum) {
        const Vec value = exp_of_negative(load(p + e * kLanes) - most) * over;
        store(p + e * kLanes, value);
        return fma(value, all(a[e]), sum);
      });
      Vec r = dz * load(softmax.lse + s, n) - dot;
      if (DW) {
        const auto d_weight_of = [&](int64_t k) {
          for (int64_t i = 0; i < n; ++i) d_of[i] = DW[(s + i) * K + k];
          return load(d_of);
        };
        Vec total{}, inner{};
        for (int64_t k = 0; k < K; ++k) {  // p_k where kept
          float* value = direct + k * kLanes;
          std::fill_n(value, kLanes, 0.f);
          for (int64_t i = 0; i < n; ++i)
            if (slots[(s + i) * K + k] >= 0) value[i] = p[chosen[(s + i) * K + k] * kLanes + i];
          total = total + load(value);
          inner = fma(load(value), d_weight_of(k), inner);
        }
        const Vec divisor = normalize ? larger(total, all(kEps)) : all(1.f);
        inner = normalize ? (total > kEps ? inner / divisor : Vec{}) : Vec{};
        for (int64_t k = 0; k < K; ++k) {
          const Vec value = load(direct + k * kLanes) * (d_weight_of(k) - inner) / divisor;
          store(direct + k * kLanes, value);
          r = r - value;
        }
      }
      for (int64_t e = 0; e < E; ++e) store(p + e * kLanes, load(p + e * kLanes) * (a[e] + r));
      by_token(p, n, E, D + s * E);
      if (DW)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t k = 0; k < K; ++k) D[(s + i) * E + chosen[(s + i) * K + k]] += direct[k * kLanes + i];
    }
  });
}

}  // namespace
}  // namespace moelab

STABLE_TORCH_LIBRARY_FRAGMENT(MOELAB_OPERATIONS, library) {
  library.def(
      "gate_forward(Tensor logits, Tensor? choice, int top_k, int? capacity, int[] hash, bool normalize, bool losses) "
      "-> Tensor[]");
  library.def(
      "gate_backward(Tensor logits, Tensor softmax, Tensor expert, Tensor slot, Tensor share, Tensor? d_weight, "
      "Tensor? d_aux, Tensor? d_z, bool normalize, Tensor(a!) d_logits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MOELAB_OPERATIONS, CPU, library) {
  library.impl("gate_forward", TORCH_BOX(&moelab::gate_forward));
  library.impl("gate_backward", TORCH_BOX(&moelab::gate_backward));
}
