// Vectors of 16 floats, loaded from and stored to float and bfloat16 memory, and the functions of them.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>

namespace moelab {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;  // 16 floats
constexpr int64_t kLanes = 16;

// Return which of 16 columns from j on a row of E has.
inline __mmask16 inside(int64_t j, int64_t E) { return E - j < kLanes ? (1 << (E - j)) - 1 : 0xffff; }

// Load 16 values as floats, and store floats as 16 values (bfloat16: to nearest even, denormals become zeros).
inline Vec load(const float* p) { return Vec::loadu(p); }
inline Vec load(const BFloat16* p) {
  __m512 wide;
  at::vec::cvtbf16_fp32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), wide);
  return wide;
}
inline void store(float* p, Vec v) { v.store(p); }
inline __m256i to_bfloat16(Vec v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
inline void store(BFloat16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(v)); }

// The same to memory that is aligned to 16 values, whose old content is not read, without keeping it in a cache.
inline void store_past_caches(float* p, Vec v) { _mm512_stream_ps(p, v); }
inline void store_past_caches(BFloat16* p, Vec v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(v)); }

// Load 16 values as bfloat16 in the lower halves of 32-bit words.
inline __m512i load_words(const float* p) { return _mm512_cvtepu16_epi32(to_bfloat16(load(p))); }
inline __m512i load_words(const BFloat16* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Write n values, a multiple of 16, as bfloat16.
inline void copy(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(from + i));
}
inline void copy(const BFloat16* from, BFloat16* to, int64_t n) { std::copy_n(from, n, to); }

// The same for the values of `mask`; others are loaded as zeros and not stored.
inline Vec load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline Vec load(const BFloat16* p, __mmask16 mask) {
  __m512 wide;
  at::vec::cvtbf16_fp32(_mm256_maskz_loadu_epi16(mask, p), wide);
  return wide;
}
inline void store(float* p, Vec v, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, v); }
inline void store(BFloat16* p, Vec v, __mmask16 mask) {
  _mm256_mask_storeu_epi16(p, mask, to_bfloat16(v));
}

// exp(x) for x <= 0 within 1 ulp, NaN for NaN. Sleef's is a call for each vector and takes twice as long.
inline Vec exp_of_negative(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.f), x);  // where exp is 0; a NaN is the second operand and stays
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 y = _mm512_set1_ps(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

struct Value { Vec value, slope; };

inline Value gelu(Vec x) {
  const Vec half(0.5f), one(1.f);
  const Vec phi = half * (one + (x * Vec(0.70710678118654752f)).erf());
  return {x * phi, phi + x * Vec(0.39894228040143268f) * (half * x * x).neg().exp()};
}

// x * sigmoid(z) with z = x (c + d x^2) is GELU's tanh approximation.
inline Value gelu_tanh(Vec x) {
  const float c = 1.5957691216057308f, d = c * 0.044715f;
  const Vec one(1.f), square = x * x;
  const Vec sigmoid = one / (one + (x * (Vec(c) + Vec(d) * square)).neg().exp());
  const Vec value = x * sigmoid;
  return {value, sigmoid + (value - value * sigmoid) * (Vec(c) + Vec(3 * d) * square)};
}

inline Value silu(Vec x) {
  const Vec one(1.f), sigmoid = one / (one + x.neg().exp());
  const Vec value = x * sigmoid;
  return {value, sigmoid + value * (one - sigmoid)};
}

}  // namespace moelab
