// Vectors of floats for the instruction set that the code is compiled for, loaded from and stored to float and bfloat16
// memory, and functions of them. Vectors are the compilers' own (GCC and clang have them for every processor); there are
// intrinsics where these lack an operation or compute it slowly.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moelab {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
#if defined(__AVX512BF16__)
constexpr bool kMultipliesBFloat16 = true;  // by instructions
#else
constexpr bool kMultipliesBFloat16 = false;  // as floats
#endif
constexpr int64_t kMultiple = 16;  // widths of rows are multiples of it, whatever the number of lanes

struct BFloat16 { uint16_t bits; };

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <typename V, typename T>
inline __attribute__((always_inline)) V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename T, typename V>
inline __attribute__((always_inline)) void store_as(T* p, const V& v) { std::memcpy(p, &v, sizeof v); }
template <typename V, typename T>
inline __attribute__((always_inline)) V same_bits(const T& v) {
  static_assert(sizeof(V) == sizeof(T));
  return load_as<V>(&v);
}

template <typename V, typename T, size_t... i>
inline __attribute__((always_inline)) V all_of(T x, std::index_sequence<i...>) { return V{((void)i, x)...}; }
// All lanes x.
inline Vec all(float x) { return all_of<Vec>(x, std::make_index_sequence<kLanes>()); }
inline Ints all(int32_t x) { return all_of<Ints>(x, std::make_index_sequence<kLanes>()); }
inline Words all(uint32_t x) { return all_of<Words>(x, std::make_index_sequence<kLanes>()); }
template <size_t... i>
inline Ints counting(std::index_sequence<i...>) { return Ints{int32_t(i)...}; }
// 0, 1, 2, ...
inline Ints lanes() { return counting(std::make_index_sequence<kLanes>()); }

// a * b + c, rounded once where the processor can.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
// The larger one; b where either is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Vec abs(Vec x) { return same_bits<Vec>(same_bits<Words>(x) & 0x7fffffffu); }

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
#endif
}
inline float largest(Vec v) {
  float found = v[0];
  for (int64_t i = 1; i < kLanes; ++i) found = std::max(found, v[i]);
  return found;
}

// Widen bfloat16, and round to it (to nearest, ties to even).
inline Words widen(Halves h) { return __builtin_convertvector(h, Words) << 16; }
inline Words rounded(Vec v) {  // in the upper halves; the lower ones are undefined
  const Words bits = same_bits<Words>(v);
  return v == v ? bits + 0x7fffu + (bits >> 16 & 1u) : all(0x7fc00000u);
}
inline Halves narrow(Vec v) {
#if defined(__AVX512BF16__)
  return same_bits<Halves>(_mm512_cvtneps_pbh(v));  // denormals become zeros
#else
  return __builtin_convertvector(rounded(v) >> 16, Halves);
#endif
}

// Load a vector of values as floats, and store floats as a vector of values.
inline Vec load(const float* p) { return load_as<Vec>(p); }
inline Vec load(const BFloat16* p) { return same_bits<Vec>(widen(load_as<Halves>(p))); }
inline void store(float* p, Vec v) { store_as(p, v); }
inline void store(BFloat16* p, Vec v) { store_as(p, narrow(v)); }

// The same of the first n values, 0 < n <= kLanes; other lanes are loaded as `rest` and not stored.
inline Vec load(const float* p, int64_t n, float rest = 0.f) {
#if defined(__AVX512F__)
  return _mm512_mask_loadu_ps(_mm512_set1_ps(rest), (1u << n) - 1, p);
#else
  if (n >= kLanes) return load(p);
  Vec v = all(rest);
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
inline void store(float* p, Vec v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
#else
  std::memcpy(p, &v, n * sizeof(float));
#endif
}
inline Vec load(const BFloat16* p, int64_t n) {
  Halves h{};
  std::memcpy(&h, p, n * sizeof(BFloat16));
  return same_bits<Vec>(widen(h));
}
inline void store(BFloat16* p, Vec v, int64_t n) {
  const Halves h = narrow(v);
  std::memcpy(p, &h, n * sizeof(BFloat16));
}

// Call work(j, ...) for each vector of n columns from j on; of the last columns, fewer than a vector, also with their number.
template <typename Work>
inline void each_vector(int64_t n, const Work& work) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) work(j);
  if (j < n) work(j, n - j);
}

// Store to memory that is aligned to a vector, whose old content is not read, without keeping it in a cache.
inline void store_past_caches(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
inline void store_past_caches(BFloat16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), same_bits<__m256i>(narrow(v)));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), same_bits<__m128i>(narrow(v)));
#else
  store(p, v);
#endif
}
// Order what was stored past the caches before what is stored afterwards.
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Write n zeros past the caches, where the memory is aligned as that needs.
template <typename W>
inline void clear_past_caches(W* to, int64_t n) {
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(W)) == 0)
    for (; i + kLanes <= n; i += kLanes) store_past_caches(to + i, Vec{});
  std::memset(to + i, 0, (n - i) * sizeof(W));
}

// Write n values, a multiple of the lanes, as the other type or the same.
inline void copy(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(from + i));
}
inline void copy(const float* from, float* to, int64_t n) { std::copy_n(from, n, to); }

// Pairs of bfloat16 as words: the first value of a pair in the lower half.
inline Words pair_up(Vec first, Vec second) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr std::array<int16_t, 32> places = [] {
    std::array<int16_t, 32> found{};
    for (int16_t i = 0; i < 32; ++i) found[i] = i / 2 + i % 2 * 16;
    return found;
  }();
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  return same_bits<Words>(_mm512_permutexvar_epi16(_mm512_load_si512(places.data()), both));
#else
  return rounded(first) >> 16 | (rounded(second) & 0xffff0000u);
#endif
}
// A value of each of two rows; `second` may be null, for zeros.
inline Words pair_up(const float* first, const float* second) {
  return pair_up(load(first), second ? load(second) : Vec{});
}
inline Words pair_up(const BFloat16* first, const BFloat16* second) {
  const Words low = __builtin_convertvector(load_as<Halves>(first), Words);
  return second ? low | widen(load_as<Halves>(second)) : low;
}
// Neighbours of one row; only the first `n` words are there, which are all or half of the lanes.
inline Words neighbours(const BFloat16* p, int64_t n) {
  if (n == kLanes) return load_as<Words>(p);
  Words w{};
  std::memcpy(&w, p, 4 * kLanes / 2);
  return w;
}
inline Words neighbours(const float* p, int64_t n) {
  const Vec first = load(p), second = n == kLanes ? load(p + kLanes) : Vec{};
#if defined(__AVX512BF16__)
  return same_bits<Words>(_mm512_cvtne2ps_pbh(second, first));
#else
  const std::array<Halves, 2> both{narrow(first), narrow(second)};
  return same_bits<Words>(both);
#endif
}

// Alternate lanes of a and b, from lane `first` of each on.
template <int64_t first, typename V, size_t... i>
inline V alternate(V a, V b, std::index_sequence<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, int(i % 2 * kLanes + i / 2 + first)...);
#else
  return __builtin_shuffle(a, b, Ints{int32_t(i % 2 * kLanes + i / 2 + first)...});
#endif
}

// Transpose a square of words, a vector for each row.
template <typename V>
inline __attribute__((always_inline)) void transpose(V (&rows)[kLanes]) {
#if defined(__AVX512F__)
  __m512i w[16], a[16];
  std::memcpy(w, rows, sizeof w);
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
  std::memcpy(rows, w, sizeof w);
#else
  constexpr auto lane = std::make_index_sequence<kLanes>();
#pragma GCC unroll 4
  for (int64_t step = 1; step < kLanes; step *= 2) {  // as a perfect shuffle of cards, once for each bit of an index
    V next[kLanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = alternate<0>(rows[i], rows[i + kLanes / 2], lane);
      next[2 * i + 1] = alternate<kLanes / 2>(rows[i], rows[i + kLanes / 2], lane);
    }
    std::copy_n(next, kLanes, rows);
  }
#endif
}

// exp(x) for x <= 0 within 1 ulp, NaN for NaN.
inline Vec exp_of_negative(Vec x) {
  x = larger(all(-104.f), x);  // where exp is 0; a NaN stays
#if defined(__AVX512F__)
  const Vec n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT);
#else
  const Vec round = all(0x1.8p23f), sum = fma(x, all(1.44269504f), round);  // to an integer, in the lowest bits of the sum
  const Vec n = sum - round;
#endif
  Vec r = fma(n, all(-0.693145752f), x);
  r = fma(n, all(-1.42860677e-6f), r);
  Vec y = all(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) y = fma(y, r, all(c));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(y, n);
#else
  const Ints power = same_bits<Ints>(sum) - same_bits<Ints>(round), half = power >> 1;  // 2^n may be a denormal
  return y * same_bits<Vec>((half + 127) << 23) * same_bits<Vec>((power - half + 127) << 23);
#endif
}

// log(x) for 1 <= x < inf within 2 ulp, NaN for NaN.
inline Vec log_of_large(Vec x) {
  const Ints bits = same_bits<Ints>(x) - 0x3f3504f3;  // so that the mantissa is in [sqrt(1/2), sqrt(2))
  const Vec n = __builtin_convertvector(bits >> 23, Vec);
  const Vec f = same_bits<Vec>((bits & 0x7fffff) + 0x3f3504f3) - 1.f, s = f / (f + 2.f), z = s * s;
  Vec y = all(0.15374f);
  for (const float c : {0.18181818f, 0.22222222f, 0.28571429f, 0.4f, 0.66666667f}) y = fma(y, z, all(c));
  y = fma(s * z, y, n * 1.42860677e-6f) + 2.f * s;
  return x == x ? fma(n, all(0.693145752f), y) : x;
}

}  // namespace moelab
