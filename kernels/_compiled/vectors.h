// Vectors of 16 floats, loaded from and stored to float and bfloat16 memory, and the functions of them.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>

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

// Write n zeros past the caches, where the memory is aligned as that needs.
template <typename W>
inline void clear_past_caches(W* to, int64_t n) {
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(W)) == 0)
    for (; i + kLanes <= n; i += kLanes) store_past_caches(to + i, Vec(0.f));
  std::fill(to + i, to + n, W(0));
}

// Load 32 values as bfloat16, or 16 from each of two places; `second` may be null, for zeros.
inline __m512i load_narrow(const float* p, const float* second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second ? _mm512_loadu_ps(second) : _mm512_setzero_ps(), _mm512_loadu_ps(p));
}
inline __m512i load_narrow(const BFloat16* p, const BFloat16* second) {
  const auto low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const auto high = second ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)) : _mm256_setzero_si256();
  return _mm512_inserti64x4(low, high, 1);
}

// Bring the two halves of 16 values each side by side: value i of the first one, value i of the second one.
inline __m512i side_by_side(__m512i halves) {
  alignas(64) static constexpr std::array<int16_t, 32> places = [] {
    std::array<int16_t, 32> found{};
    for (int16_t i = 0; i < 32; ++i) found[i] = i / 2 + i % 2 * 16;
    return found;
  }();
  return _mm512_permutexvar_epi16(_mm512_load_si512(places.data()), halves);
}

// Transpose 16 x 16 words.
inline __attribute__((always_inline)) void transpose(__m512i (&w)[16]) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // pairs of rows: 2 x 2 words
    a[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // four rows: columns 4 j + 0 to 3 in lane j
    w[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    w[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    w[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    w[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // eight rows: lanes 0, 2 and 1, 3
    a[i] = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    w[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    w[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    w[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    w[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

// Write n values, a multiple of 16, as the other type or the same.
inline void copy(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(from + i));
}
inline void copy(const float* from, float* to, int64_t n) { std::copy_n(from, n, to); }
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

// 1 / (1 + exp(-x)), without overflow.
inline Vec sigmoid(Vec x) {
  const Vec one(1.f), e = exp_of_negative(_mm512_or_ps(x, _mm512_set1_ps(-0.f)));  // exp(-|x|)
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return Vec(_mm512_mask_mov_ps(one, negative, e)) / (one + e);
}

struct Value { Vec value, slope; };

// x Phi(x) with Phi(x) = erfc(-x / sqrt(2)) / 2; erfc within 1.5e-7 (Abramowitz and Stegun, 7.1.26), whose exp(-x^2 / 2)
// the slope needs as well.
inline Value gelu(Vec x) {
  const Vec one(1.f), half(0.5f), u = x.abs() * Vec(0.70710678118654752f);
  const Vec e = exp_of_negative((u * u).neg()), t = one / at::vec::fmadd(u, Vec(0.3275911f), one);
  Vec r(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) r = at::vec::fmadd(r, t, Vec(c));
  const Vec tail = half * r * t * e;  // Phi(-|x|)
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  const Vec phi = _mm512_mask_mov_ps(one - tail, negative, tail);
  return {x * phi, at::vec::fmadd(x * Vec(0.39894228040143268f), e, phi)};
}

// x * sigmoid(z) with z = x (c + d x^2) is GELU's tanh approximation.
inline Value gelu_tanh(Vec x) {
  const float c = 1.5957691216057308f, d = c * 0.044715f;
  const Vec square = x * x, s = sigmoid(x * (Vec(c) + Vec(d) * square)), value = x * s;
  return {value, s + (value - value * s) * (Vec(c) + Vec(3 * d) * square)};
}

inline Value silu(Vec x) {
  const Vec s = sigmoid(x), value = x * s;
  return {value, s + value * (Vec(1.f) - s)};
}

}  // namespace moelab
