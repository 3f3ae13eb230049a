// The gate and its gradient; gating.py describes the operations and kernels/gating.py what they compute.
//
// A task is kBlock tokens, of which 16 at a time lie in the lanes of vectors, one vector for each expert: maxima,
// choices and sums over experts need no operations across a vector, and any number of experts fills its vectors. Sums
// over tokens are taken within a block first, then over the blocks in order, so that a result has the same bits however
// many threads share the blocks. Experts and slots are integers, and equal those of every other implementation.
// S: tokens, E: experts, K: experts per token, C: capacity.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "products.h"

#include <cmath>
#include <limits>

namespace moelab {
namespace {

constexpr int64_t kBlock = 128;  // tokens of a task, a multiple of kLanes
constexpr int64_t kMost = 512;   // experts
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kEps = std::numeric_limits<float>::epsilon();

// Load 16 columns of a row, -inf past its end.
inline Vec columns(const float* row, int64_t j, int64_t E) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(-kInfinity), inside(j, E), row + j);
}

// What the backward pass needs of the softmax, each [S]: p = exp(x - largest) * over.
struct Softmax {
  float *largest, *over, *lse;
  Softmax(const at::Tensor& t) : largest(t.data_ptr<float>()), over(largest + t.size(1)), lse(over + t.size(1)) {}
};

// Write n <= 16 rows of E as E vectors of 16 tokens; past the last row, tokens are copies of it.
void by_expert(const float* rows, int64_t n, int64_t E, float* to) {
  alignas(64) float square[kLanes * kLanes];
  for (int64_t j = 0; j < E; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const float* row = rows + std::min(i, n - 1) * E;
      store(square + i * kLanes, columns(row, j, E));
      __builtin_prefetch(row + kLanes * E + j);  // for the next call, because reading is not in order of addresses
    }
    at::vec::transpose_mxn<float, 16, 16>(square, kLanes, to + j * kLanes, kLanes);
  }
}

// Write n <= 16 rows of E, which are given as E vectors of 16 tokens.
void by_token(const float* x, int64_t n, int64_t E, float* rows) {
  alignas(64) float square[kLanes * kLanes];
  for (int64_t j = 0; j < E; j += kLanes) {
    at::vec::transpose_mxn<float, 16, 16>(x + j * kLanes, kLanes, square, kLanes);
    for (int64_t i = 0; i < n; ++i) _mm512_mask_storeu_ps(rows + i * E + j, inside(j, E), load(square + i * kLanes));
  }
}

// Return the sum over the experts; add(e, sum) returns a sum with e's term. Sums of 16 terms round less than a long
// one, and do not wait for each other.
template <typename Add>
Vec sum_of_experts(int64_t E, const Add& add) {
  Vec total(0.f);
  for (int64_t from = 0; from < E; from += 16) {
    Vec sum(0.f);
    for (int64_t e = from; e < std::min(from + 16, E); ++e) sum = add(e, sum);
    total = total + sum;
  }
  return total;
}

struct Choice { __m512 value; __m512i expert; };  // of 16 tokens

// Return the largest value and its expert among those that come after the previous choice, or among all for the `first`
// one; ties go to the lower expert. -inf is a value like any other.
Choice choose(const float* x, int64_t E, bool first, Choice previous) {
  Choice found{_mm512_set1_ps(-kInfinity), _mm512_setzero_si512()};
  for (int64_t e = E - 1; e >= 0; --e) {  // downwards, so that the lower one of equal experts comes last
    const __m512 value = load(x + e * kLanes);
    const __m512i expert = _mm512_set1_epi32(e);
    __mmask16 left = 0xffff;
    if (!first) {
      left = _mm512_mask_cmplt_epi32_mask(
          _mm512_cmp_ps_mask(value, previous.value, _CMP_EQ_OQ), previous.expert, expert);
      left |= _mm512_cmp_ps_mask(value, previous.value, _CMP_LT_OQ);
    }
    const __mmask16 better = _mm512_mask_cmp_ps_mask(left, value, found.value, _CMP_GE_OQ);
    found.expert = _mm512_mask_mov_epi32(found.expert, better, expert);
    found.value = _mm512_mask_max_ps(found.value, left, found.value, value);
  }
  return found;
}

// Write a block's experts and weights, whether each token is `fine`, and the sums of the probabilities; return the sum
// of lse^2.
float softmax_and_experts(
    const float* logits, const float* choice, int64_t first, int64_t last, int64_t E, int64_t K, const Softmax& softmax,
    int32_t* expert, float* weight, uint8_t* fine, float* sums) {
  alignas(64) float tile[kMost * kLanes], other[kMost * kLanes], sums_of_lanes[kMost * kLanes];
  std::fill_n(sums_of_lanes, E * kLanes, 0.f);
  Vec squares(0.f);
  for (int64_t s = first; s < last; s += kLanes) {
    const int64_t n = std::min(kLanes, last - s);
    const __mmask16 there = inside(0, n);
    by_expert(logits + s * E, n, E, tile);
    const float* decisive = tile;
    Vec largest(-kInfinity);
    __mmask16 undefined = 0;
    if (choice) {
      by_expert(choice + s * E, n, E, other);
      decisive = other;
      for (int64_t e = 0; e < E; ++e) {
        const __m512 value = load(other + e * kLanes);
        undefined |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        largest = _mm512_max_ps(largest, load(tile + e * kLanes));
      }
    }
    alignas(64) int32_t ids[kLanes];
    alignas(64) float values[kLanes];
    Choice chosen{};
    for (int64_t k = 0; k < K; ++k) {
      chosen = choose(decisive, E, k == 0, chosen);
      if (k == 0 && !choice) largest = chosen.value;
      _mm512_store_si512(ids, chosen.expert);
      for (int64_t i = 0; i < n; ++i) expert[(s + i) * K + k] = ids[i];
    }
    const Vec total = sum_of_experts(E, [&](int64_t e, Vec sum) {
      const Vec value = exp_of_negative(load(tile + e * kLanes) - largest);
      store(tile + e * kLanes, value);
      return sum + value;
    });
    const Vec over = Vec(1.f) / total, lse = largest + total.log();
    const Vec within = _mm512_maskz_mov_ps(there, over);  // the copies do not count
    for (int64_t e = 0; e < E; ++e) {
      float* sum = sums_of_lanes + e * kLanes;
      store(sum, at::vec::fmadd(load(tile + e * kLanes), within, load(sum)));
    }
    squares = squares + Vec(_mm512_maskz_mul_ps(there, lse, lse));
    undefined |= ~_mm512_cmp_ps_mask(lse.abs(), Vec(kInfinity), _CMP_LT_OQ);
    store(values, over);
    for (int64_t i = 0; i < n; ++i) {
      fine[s + i] = !(undefined >> i & 1);
      for (int64_t k = 0; k < K; ++k) {
        int32_t& id = expert[(s + i) * K + k];
        if (!fine[s + i]) id = k;
        weight[(s + i) * K + k] = tile[id * kLanes + i] * values[i];
      }
    }
    _mm512_mask_storeu_ps(softmax.largest + s, there, largest);
    _mm512_mask_storeu_ps(softmax.over + s, there, over);
    _mm512_mask_storeu_ps(softmax.lse + s, there, lse);
  }
  for (int64_t e = 0; e < E; ++e) sums[e] = _mm512_reduce_add_ps(load(sums_of_lanes + e * kLanes));
  return _mm512_reduce_add_ps(squares);
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
      const uint32_t token = mix(uint32_t(s) ^ uint32_t(hash[0]));
      const uint32_t priority = mix((token + uint32_t(k) * 0x9E3779B9u) ^ uint32_t(hash[1]));
      keys[k * S + s] = uint64_t(~priority) << (bits - 32) | (s * K + k);
    }
  for (int64_t k = 0; k < K; ++k)
    for (int64_t s = 0; s < S; ++s)
      if (slot[s * K + k] >= 0) of_expert[start[expert[s * K + k]] + slot[s * K + k]] = keys[k * S + s];
  at::parallel_for(0, E, 1 + 2048 * E / N, [&](int64_t first, int64_t last) {
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

// Return the gate's results, then what the backward pass needs: the softmax's numbers and the shares of first choices.
std::vector<at::Tensor> gate_forward(
    const at::Tensor& logits, const std::optional<at::Tensor>& choice, int64_t K, std::optional<int64_t> capacity,
    at::IntArrayRef hash, bool normalize) {
  const int64_t S = logits.size(0), E = logits.size(1), blocks = (S + kBlock - 1) / kBlock;
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
  std::vector<float> sums(blocks * E), squares(blocks);
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      squares[b] = softmax_and_experts(
          X, Y, b * kBlock, std::min((b + 1) * kBlock, S), E, K, softmax, chosen, W, fine.data(), &sums[b * E]);
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
    for (int64_t b = 0; b < blocks; ++b) sum += sums[b * E + e];
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
  std::vector<float> a(E, 0.f);
  if (d_aux.has_value())
    for (int64_t e = 0; e < E; ++e) a[e] = share[e] * (*d_aux->data_ptr<float>() * float(double(E) / S));
  const Vec dz(d_z.has_value() ? 2.f / S * *d_z->data_ptr<float>() : 0.f);
  at::parallel_for(0, (S + kBlock - 1) / kBlock, 1, [&](int64_t from, int64_t to) {
    alignas(64) float p[kMost * kLanes], direct[kMost * kLanes];  // direct: p_k q_k
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i entry = _mm512_mullo_epi32(lane, _mm512_set1_epi32(K));
    for (int64_t s = from * kBlock; s < std::min(to * kBlock, S); s += kLanes) {
      const int64_t n = std::min(kLanes, S - s);
      const __mmask16 there = inside(0, n);
      const Vec largest = _mm512_maskz_loadu_ps(there, softmax.largest + s);
      const Vec over = _mm512_maskz_loadu_ps(there, softmax.over + s);
      by_expert(X + s * E, n, E, p);
      const Vec dot = sum_of_experts(E, [&](int64_t e, Vec sum) {
        const Vec value = exp_of_negative(load(p + e * kLanes) - largest) * over;
        store(p + e * kLanes, value);
        return at::vec::fmadd(value, Vec(a[e]), sum);
      });
      Vec r = dz * Vec(_mm512_maskz_loadu_ps(there, softmax.lse + s)) - dot;
      if (DW) {
        const __m512 zero = _mm512_setzero_ps();
        Vec total(0.f), inner(0.f);
        for (int64_t k = 0; k < K; ++k) {  // p_k where kept
          const __m512i at = _mm512_mask_i32gather_epi32(_mm512_set1_epi32(-1), there, entry, slots + s * K + k, 4);
          const __mmask16 kept = _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512());
          const __m512i id = _mm512_mask_i32gather_epi32(at, there, entry, chosen + s * K + k, 4);
          const __m512i place = _mm512_add_epi32(_mm512_slli_epi32(id, 4), lane);
          const Vec value = _mm512_mask_i32gather_ps(zero, kept, place, p, 4);
          const Vec d = _mm512_mask_i32gather_ps(zero, there, entry, DW + s * K + k, 4);
          store(direct + k * kLanes, value);
          total = total + value;
          inner = at::vec::fmadd(value, d, inner);
        }
        const Vec divisor = normalize ? at::vec::maximum(total, Vec(kEps)) : Vec(1.f);
        const __mmask16 divided = normalize ? _mm512_cmp_ps_mask(total, Vec(kEps), _CMP_GT_OQ) : 0;
        inner = _mm512_maskz_div_ps(divided, inner, divisor);
        for (int64_t k = 0; k < K; ++k) {
          const Vec d = _mm512_mask_i32gather_ps(zero, there, entry, DW + s * K + k, 4);
          const Vec value = load(direct + k * kLanes) * (d - inner) / divisor;
          store(direct + k * kLanes, value);
          r = r - value;
        }
      }
      for (int64_t e = 0; e < E; ++e) store(p + e * kLanes, load(p + e * kLanes) * (Vec(a[e]) + r));
      by_token(p, n, E, D + s * E);
      if (DW)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t k = 0; k < K; ++k) D[(s + i) * E + chosen[(s + i) * K + k]] += direct[k * kLanes + i];
    }
  });
}

}  // namespace
}  // namespace moelab

TORCH_LIBRARY_FRAGMENT(moelab, library) {
  library.def(
      "gate_forward(Tensor logits, Tensor? choice, int top_k, int? capacity, int[] hash, bool normalize) -> Tensor[]");
  library.def(
      "gate_backward(Tensor logits, Tensor softmax, Tensor expert, Tensor slot, Tensor share, Tensor? d_weight, "
      "Tensor? d_aux, Tensor? d_z, bool normalize, Tensor(a!) d_logits) -> ()");
}

TORCH_LIBRARY_IMPL(moelab, CPU, library) {
  library.impl("gate_forward", moelab::gate_forward);
  library.impl("gate_backward", moelab::gate_backward);
}
