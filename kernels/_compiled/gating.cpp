// The gate and its gradient; gating.py describes the operations and kernels/gating.py what they compute.
//
// A task is kBlock tokens. What is summed over tokens is summed within a block first and then over the blocks in order,
// so that a result has the same bits however many threads share the blocks. Experts and slots are integers and equal
// those of every other implementation. S: tokens, E: experts, K: experts per token, C: capacity.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "products.h"

#include <cmath>
#include <limits>

namespace moelab {
namespace {

constexpr int64_t kBlock = 128;  // tokens of a task
constexpr int64_t kTile = 16;    // tokens whose exponentials are in cache at a time; their sums fill one vector
constexpr int64_t kMost = 512;   // experts
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kEps = std::numeric_limits<float>::epsilon();

// Load 16 columns of a row of E, -inf past its end.
inline __m512 columns(const float* row, int64_t j, int64_t E) {
  const __mmask16 there = E - j < kLanes ? (1 << (E - j)) - 1 : 0xffff;
  return _mm512_mask_loadu_ps(_mm512_set1_ps(-kInfinity), there, row + j);
}

// Write the K experts with the largest values, ties to the lower expert. Return whether no value is NaN; with one, the
// experts are any. Experts are taken out by masks, because -inf is a value like any other.
bool choose(const float* row, int64_t E, int64_t K, int32_t* expert) {
  __mmask16 left[kMost / kLanes];
  __mmask16 unordered = 0;
  const int64_t vectors = (E + kLanes - 1) / kLanes;
  std::fill_n(left, vectors, 0xffff);
  for (int64_t k = 0; k < K; ++k) {
    __m512 largest = _mm512_set1_ps(-kInfinity);
    for (int64_t v = 0; v < vectors; ++v) {
      const __m512 x = columns(row, v * kLanes, E);
      unordered |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      largest = _mm512_mask_max_ps(largest, left[v], largest, x);
    }
    const __m512 sought = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    int32_t found = 0;
    for (int64_t v = vectors - 1; v >= 0; --v) {  // downwards and without a jump, which would be hard to predict
      const uint32_t equal = _mm512_mask_cmp_ps_mask(left[v], columns(row, v * kLanes, E), sought, _CMP_EQ_OQ);
      found = equal ? v * kLanes + __builtin_ctz(equal) : found;
    }
    left[found / kLanes] &= ~(1 << found % kLanes);
    expert[k] = found;
  }
  return unordered == 0;
}

// What the backward pass needs of the softmax, each [S]: p = exp(x - largest) * over.
struct Softmax {
  float *largest, *over, *lse;
  Softmax(const at::Tensor& t) : largest(t.data_ptr<float>()), over(largest + t.size(1)), lse(over + t.size(1)) {}
};

// Write a block's experts and weights, and whether each token is `fine`. Add the probabilities to `sums`, and return the
// sum of lse^2.
float softmax_and_experts(
    const float* logits, const float* choice, int64_t first, int64_t last, int64_t E, int64_t K, const Softmax& softmax,
    int32_t* expert, float* weight, uint8_t* fine, float* sums) {
  alignas(64) float e[kTile * kMost], largest[kTile], total[kTile], over[kTile], lse[kTile];
  const int64_t wide = round_up(E, kLanes);
  Vec squares(0.f);
  for (int64_t s = first; s < last; s += kTile) {
    const int64_t n = std::min(kTile, last - s);
    std::fill_n(largest, kTile, 0.f);
    std::fill_n(total, kTile, 1.f);  // past the last token, lse = 0
    for (int64_t i = 0; i < n; ++i) {
      const float* row = logits + (s + i) * E;
      int32_t* chosen = expert + (s + i) * K;
      if (choice) {
        fine[s + i] = choose(choice + (s + i) * E, E, K, chosen);
        __m512 most = columns(row, 0, E);
        for (int64_t j = kLanes; j < E; j += kLanes) most = _mm512_max_ps(most, columns(row, j, E));
        largest[i] = _mm512_reduce_max_ps(most);
      } else {
        fine[s + i] = choose(row, E, K, chosen);
        largest[i] = row[chosen[0]];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const Vec shift(largest[i]);
      Vec sum(0.f);
      for (int64_t j = 0; j < E; j += kLanes) {
        const Vec value = (Vec(columns(logits + (s + i) * E, j, E)) - shift).exp();
        store(e + i * wide + j, value);
        sum = sum + value;
      }
      total[i] = _mm512_reduce_add_ps(sum);
    }
    const Vec logs = load(largest) + load(total).log();
    squares = squares + logs * logs;
    store(lse, logs);
    store(over, Vec(1.f) / load(total));
    for (int64_t j = 0; j < E; j += kLanes) {
      Vec sum = load(sums + j);
      for (int64_t i = 0; i < n; ++i) sum = at::vec::fmadd(load(e + i * wide + j), Vec(over[i]), sum);
      store(sums + j, sum);
    }
    for (int64_t i = 0; i < n; ++i) {
      fine[s + i] &= std::isfinite(lse[i]);
      for (int64_t k = 0; k < K; ++k) {
        if (!fine[s + i]) expert[(s + i) * K + k] = k;
        weight[(s + i) * K + k] = e[i * wide + expert[(s + i) * K + k]] * over[i];
      }
    }
    std::copy_n(largest, n, softmax.largest + s);
    std::copy_n(over, n, softmax.over + s);
    std::copy_n(lse, n, softmax.lse + s);
  }
  return _mm512_reduce_add_ps(squares);
}

inline uint32_t mix(uint32_t x) {  // as in kernels/_hash.py
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

// Return the `nth` smallest (from 1) of different keys below 2^bits, bit by bit: a key of at least `found` is the answer
// if fewer than nth keys are smaller. The comparisons are vector instructions, and no jump depends on a key.
uint64_t smallest(const uint64_t* keys, int64_t n, int64_t nth, int64_t bits) {
  uint64_t found = 0;
  for (int64_t b = bits - 1; b >= 0; --b) {
    const uint64_t next = found | uint64_t(1) << b;
    int64_t below = 0;
    for (int64_t i = 0; i < n; ++i) below += keys[i] < next;
    if (below < nth) found = next;
  }
  return found;
}

// Replace the slots, which are the entries' ranks within their experts, by those of C random entries per expert.
// count: entries of each expert, kept: where to count the kept ones.
void keep_random(
    int64_t S, int64_t E, int64_t K, int64_t C, at::IntArrayRef hash, const int32_t* expert, const int32_t* count,
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
      const uint32_t priority = mix(mix(uint32_t(s) ^ uint32_t(hash[0])) + uint32_t(k) * 0x9E3779B9u ^ uint32_t(hash[1]));
      keys[k * S + s] = uint64_t(~priority) << (bits - 32) | (s * K + k);
    }
  for (int64_t k = 0; k < K; ++k)
    for (int64_t s = 0; s < S; ++s)
      if (slot[s * K + k] >= 0) of_expert[start[expert[s * K + k]] + slot[s * K + k]] = keys[k * S + s];
  at::parallel_for(0, E, 1 + 2048 * E / N, [&](int64_t first, int64_t last) {
    for (int64_t e = first; e < last; ++e)
      limit[e] = count[e] > C ? smallest(of_expert + start[e], count[e], C, bits) : ~uint64_t(0);
  });
  std::fill_n(kept, E, 0);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t s = 0; s < S; ++s) {
      const int64_t i = s * K + k, e = expert[i];
      const bool keep = slot[i] >= 0 && keys[k * S + s] <= limit[e];
      slot[i] = keep ? kept[e] : -1;
      kept[e] += keep;
    }
}

using Outputs = std::tuple<
    at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs gate_forward(
    const at::Tensor& logits, const std::optional<at::Tensor>& choice, int64_t K, std::optional<int64_t> capacity,
    at::IntArrayRef hash, bool normalize) {
  const int64_t S = logits.size(0), E = logits.size(1), wide = round_up(E, kLanes), blocks = (S + kBlock - 1) / kBlock;
  TORCH_CHECK(E <= kMost && K <= E && S * K < int64_t(1) << 31, "gate: too many experts or tokens");
  const auto ints = logits.options().dtype(at::kInt);
  auto expert = at::empty({S, K}, ints), slot = at::empty({S, K}, ints);
  auto load_E = at::empty({E}, ints), kept_E = at::empty({E}, ints);
  auto weight = at::empty({S, K}, logits.options()), share_E = at::empty({E}, logits.options());
  auto aux = at::empty({}, logits.options()), z = at::empty({}, logits.options());
  auto kept_softmax = at::empty({3, S}, logits.options());
  const float *X = logits.data_ptr<float>(), *Y = choice.has_value() ? choice->data_ptr<float>() : nullptr;
  int32_t *chosen = expert.data_ptr<int32_t>(), *slots = slot.data_ptr<int32_t>();
  int32_t *load = load_E.data_ptr<int32_t>(), *kept = kept_E.data_ptr<int32_t>();
  float *W = weight.data_ptr<float>(), *share = share_E.data_ptr<float>();
  const Softmax softmax(kept_softmax);

  std::vector<uint8_t> fine(S);
  std::vector<float> sums(blocks * wide, 0.f), squares(blocks);
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      squares[b] = softmax_and_experts(
          X, Y, b * kBlock, std::min((b + 1) * kBlock, S), E, K, softmax, chosen, W, fine.data(), &sums[b * wide]);
  });

  // Slots as without a capacity: an entry's rank within its expert, first choices first.
  std::vector<int32_t> count(E + 1, 0);  // at E: entries of tokens that are not routed
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t s = 0; s < S; ++s) {
      const int64_t i = s * K + k;
      const int32_t rank = count[fine[s] ? chosen[i] : E]++;
      slots[i] = fine[s] ? rank : -1;
    }
    if (k == 0)
      for (int64_t e = 0; e < E; ++e) share[e] = float(double(count[e]) / std::max<int64_t>(S, 1));
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

  double balance = 0, square = 0;
  for (int64_t e = 0; e < E; ++e) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += sums[b * wide + e];
    balance += sum * share[e];
  }
  for (int64_t b = 0; b < blocks; ++b) square += squares[b];
  const double tokens = std::max<int64_t>(S, 1), poison = healthy ? 0. : std::numeric_limits<double>::quiet_NaN();
  *aux.data_ptr<float>() = float(balance * E / tokens + poison);
  *z.data_ptr<float>() = float(square / tokens + poison);
  return {expert, slot, weight, load_E, kept_E, aux, z, kept_softmax, share_E};
}

// dL/dlogit = p (a_e + r_s), plus p_k q_k at the kept choices, with q = dL/dp there; r_s = 2/S dz lse_s - <p_s, a> -
// sum_k p_k q_k.
void gate_backward(
    const at::Tensor& logits, const at::Tensor& kept_softmax, const at::Tensor& expert, const at::Tensor& slot,
    const at::Tensor& share_E, const std::optional<at::Tensor>& d_weight, const std::optional<at::Tensor>& d_aux,
    const std::optional<at::Tensor>& d_z, bool normalize, const at::Tensor& d_logits) {
  const int64_t S = logits.size(0), E = logits.size(1), K = expert.size(1);
  const float *X = logits.data_ptr<float>(), *DW = d_weight.has_value() ? d_weight->data_ptr<float>() : nullptr;
  const auto *chosen = expert.data_ptr<int32_t>(), *slots = slot.data_ptr<int32_t>();
  const float* share = share_E.data_ptr<float>();
  float* D = d_logits.data_ptr<float>();
  const Softmax softmax(kept_softmax);
  alignas(64) float a[kMost] = {};
  if (d_aux.has_value())
    for (int64_t e = 0; e < E; ++e) a[e] = share[e] * (*d_aux->data_ptr<float>() * float(double(E) / S));
  const float dz = d_z.has_value() ? 2.f / S * *d_z->data_ptr<float>() : 0.f;
  at::parallel_for(0, (S + kBlock - 1) / kBlock, 1, [&](int64_t from, int64_t to) {
    alignas(64) float p[kMost], raw[kMost];
    for (int64_t s = from * kBlock; s < std::min(to * kBlock, S); ++s) {
      const Vec shift(softmax.largest[s]), over(softmax.over[s]);
      Vec dot(0.f);
      for (int64_t j = 0; j < E; j += kLanes) {
        const Vec value = (Vec(columns(X + s * E, j, E)) - shift).exp() * over;
        store(p + j, value);
        dot = at::vec::fmadd(value, load(a + j), dot);
      }
      float r = dz * softmax.lse[s] - _mm512_reduce_add_ps(dot);
      if (DW) {  // raw becomes p_k q_k
        float total = 0, inner = 0;
        for (int64_t k = 0; k < K; ++k) {
          raw[k] = slots[s * K + k] < 0 ? 0.f : p[chosen[s * K + k]];
          total += raw[k];
          inner += raw[k] * DW[s * K + k];
        }
        const float divisor = normalize ? std::max(total, kEps) : 1.f;
        inner = normalize && total > kEps ? inner / divisor : 0.f;
        for (int64_t k = 0; k < K; ++k) {
          raw[k] *= (DW[s * K + k] - inner) / divisor;
          r -= raw[k];
        }
      }
      for (int64_t j = 0; j < E; j += kLanes) {
        const __mmask16 there = E - j < kLanes ? (1 << (E - j)) - 1 : 0xffff;
        _mm512_mask_storeu_ps(D + s * E + j, there, load(p + j) * (load(a + j) + Vec(r)));
      }
      if (DW)
        for (int64_t k = 0; k < K; ++k) D[s * E + chosen[s * K + k]] += raw[k];
    }
  });
}

}  // namespace
}  // namespace moelab

TORCH_LIBRARY_FRAGMENT(moelab, library) {
  library.def(
      "gate_forward(Tensor logits, Tensor? choice, int top_k, int? capacity, int[] hash, bool normalize) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "gate_backward(Tensor logits, Tensor softmax, Tensor expert, Tensor slot, Tensor share, Tensor? d_weight, "
      "Tensor? d_aux, Tensor? d_z, bool normalize, Tensor(a!) d_logits) -> ()");
}

TORCH_LIBRARY_IMPL(moelab, CPU, library) {
  library.impl("gate_forward", moelab::gate_forward);
  library.impl("gate_backward", moelab::gate_backward);
}
