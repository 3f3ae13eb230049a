// What a decoding step is made of: operations of other files, without checks of what the step has checked.
#pragma once

#include <cmath>

#include "operation.h"

namespace moelab {

enum NormOfHeads : int64_t { kNoNorm, kOfHead, kOfAll };

// The heads of attention, and what happens to queries and keys before it.
struct Heads {
  int64_t queries, keys, size, norm;
  float eps;
  Optional q_norm, k_norm;  // weights of the RMS norms
  Optional shares;          // float [keys]: of the key before each one in it
  Optional angles;          // float [places, size]: cosines, then sines
};

// New tokens of some sequences, whose rows follow each other.
struct Sequences {
  std::vector<int64_t> slot, start, count, ends;  // start: place of the first token; ends: past the last row
  int64_t first(int64_t sequence) const { return ends[sequence] - count[sequence]; }
  int64_t rows() const { return ends.empty() ? 0 : ends.back(); }
};

// Keys and values [layers, slots, heads, places, size], and the last keys [layers, slots, heads, size], not mixed.
struct Cached { Tensor keys, values; Optional last; };

// y = the RMS norm of a row, times the weight.
template <typename T>
void rms_norm(const T* x, const T* weight, float eps, int64_t n, T* y) {
  Vec squares{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load(x + i);
    squares = fma(v, v, squares);
  }
  const float scale = 1.f / std::sqrt(sum(squares) / n + eps);
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
}

// The attention [R, queries * size] of new tokens over all tokens of their sequences up to them. Their keys and values
// are written to the cache; queries and keys in qkv change.
Tensor attend(const Tensor& qkv, const Heads& heads, const Sequences& sequences, const Cached& cached, int64_t layer);

// act(x @ W + bias) + add, with W packed.
Tensor linear(
    const Tensor& x, const Tensor& packed, const Optional& bias, int64_t columns, int64_t activation, const Optional& add);

// Experts, slots, weights, loads and kept entries of tokens; see kernels/gating.py.
std::vector<Tensor> gate_forward(
    const Tensor& logits, const Optional& choice, int64_t K, std::optional<int64_t> capacity, std::vector<int64_t> hash,
    bool normalize, bool losses);

// Each token's weighted sum of its experts' outputs, plus add, with packed matrices of inner width F.
Tensor routed_experts(
    const Tensor& x, const Tensor& expert, const Tensor& slot, const Tensor& kept, const Tensor& weight,
    const Tensor& up, const Optional& up_bias, const Tensor& down, const Optional& down_bias, int64_t F,
    int64_t activation, const Optional& add);

// a_0 moe + a_1 mlp + add; see kernels/residual.py. `a` gets both coefficients.
Tensor mix(
    const Tensor& moe, const Tensor& mlp, const Optional& a, const Tensor& x, const Tensor& difference, double bias,
    const Optional& add);

}  // namespace moelab
