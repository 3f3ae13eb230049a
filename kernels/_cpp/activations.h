// Activations and their slopes, by the numbers that kernels/activations.py gives them.
#pragma once

#include "vectors.h"

namespace moelab {

enum Activation : int64_t { kNone, kGelu, kGeluTanh, kSwiglu };

// 1 / (1 + exp(-x)), without overflow.
inline Vec sigmoid(Vec x) {
  const Vec e = exp_of_negative(same_bits<Vec>(same_bits<Words>(x) | 0x80000000u));  // exp(-|x|)
  return (x < 0.f ? e : all(1.f)) / (e + 1.f);
}

struct Value { Vec value, slope; };

// x Phi(x) with Phi(x) = erfc(-x / sqrt(2)) / 2; erfc within 1.5e-7 (Abramowitz and Stegun, 7.1.26), whose exp(-x^2 / 2)
// the slope needs as well.
inline Value gelu(Vec x) {
  const Vec u = abs(x) * 0.70710678118654752f, e = exp_of_negative(-(u * u));
  const Vec t = 1.f / fma(u, all(0.3275911f), all(1.f));
  Vec r = all(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) r = fma(r, t, all(c));
  const Vec tail = 0.5f * r * t * e;  // Phi(-|x|)
  const Vec phi = x < 0.f ? tail : 1.f - tail;
  return {x * phi, fma(x * 0.39894228040143268f, e, phi)};
}

// x * sigmoid(z) with z = x (c + d x^2) is GELU's tanh approximation.
inline Value gelu_tanh(Vec x) {
  const float c = 1.5957691216057308f, d = c * 0.044715f;
  const Vec square = x * x, s = sigmoid(x * fma(square, all(d), all(c))), value = x * s;
  return {value, fma(value * (1.f - s), fma(square, all(3 * d), all(c)), s)};
}

inline Value silu(Vec x) {
  const Vec s = sigmoid(x), value = x * s;
  return {value, fma(value, 1.f - s, s)};
}

// Return the activation of x and its slope; with gates, of x and u, and the slope is that to x.
inline Value activate(int64_t activation, Vec x, Vec u) {
  switch (activation) {
    case kGelu: return gelu(x);
    case kGeluTanh: return gelu_tanh(x);
    case kSwiglu: {
      const Value s = silu(x);
      return {s.value * u, s.slope * u};
    }
    default: return {x, all(1.f)};
  }
}

}  // namespace moelab
