// A vector of floats, 16 wide with AVX-512 and 8 wide otherwise, loaded from and stored to float32, bfloat16, float16
// and int8.
//
// load_pair and store_pair move 2 * kWidth elements in whatever lane order is cheapest for the type: 32 bfloat16 values
// widen with one shift and one mask when even and odd elements go to different vectors. Queries, tiles and accumulators
// all pass through them, so the order cancels out.
//
// Included by each kernels_*.cpp under its own compiler flags, so everything has internal linkage.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/float16.h"
#include "common/layout.h"

namespace ssd {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// A byte of a vector that has a scale (common/int8.h).
struct Int8 {
  int8_t value;
};

SSD_INLINE float to_float(float x) { return x; }
SSD_INLINE float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
SSD_INLINE float to_float(Int8 x) { return x.value; }

SSD_INLINE void from_float(float x, float* to) { *to = x; }
// Rounds to nearest, of two equally near bytes to the even one. |x| is below 127.5.
SSD_INLINE void from_float(float x, Int8* to) { to->value = static_cast<int8_t>(__builtin_lrintf(x)); }
SSD_INLINE void from_float(float x, BFloat16* to) {
  const uint32_t bits = bits_of(x);
  // Round to nearest even; a NaN stays a NaN even when its payload is all in the dropped half.
  to->bits = static_cast<uint16_t>(x == x ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : 0x7FC0);
}

#if defined(__F16C__)
SSD_INLINE float to_float(Float16 x) { return _cvtsh_ss(x.bits); }
SSD_INLINE void from_float(float x, Float16* to) { to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__ARM_FP16_FORMAT_IEEE)
SSD_INLINE float to_float(Float16 x) {
  __fp16 value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}
SSD_INLINE void from_float(float x, Float16* to) {
  const __fp16 value = x;
  std::memcpy(to, &value, sizeof value);
}
#else
SSD_INLINE float to_float(Float16 x) { return float16_to_float(x.bits); }
SSD_INLINE void from_float(float x, Float16* to) { to->bits = float_to_float16(x); }
#endif

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 x;
};
SSD_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
SSD_INLINE Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
SSD_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
SSD_INLINE Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
SSD_INLINE Vec load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
SSD_INLINE Vec load(const Int8* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// The last 8 elements of a head_dim that is no multiple of 16; the other lanes are zero.
SSD_INLINE Vec load_half(const float* p) { return {_mm512_maskz_loadu_ps(0xFF, p)}; }
SSD_INLINE Vec load_half(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(0xFF, p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
SSD_INLINE Vec load_half(const Float16* p) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(0xFF, p))}; }
SSD_INLINE Vec load_half(const Int8* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
SSD_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
SSD_INLINE void load_pair(const BFloat16* p, Vec& a, Vec& b) {
  const __m512i both = _mm512_loadu_si512(p);
  a = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
  b = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))))};
}
SSD_INLINE __m512i round_to_bfloat16(Vec a) {  // in the upper half of each lane
  const __m512i bits = _mm512_castps_si512(a.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
}
SSD_INLINE void store_pair(BFloat16* p, Vec a, Vec b) {
  const __m512i high = _mm512_and_si512(round_to_bfloat16(b), _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
  _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(round_to_bfloat16(a), 16), high));
}
SSD_INLINE void store(BFloat16* p, Vec a) {
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bfloat16(a), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}
SSD_INLINE void store(Float16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}
SSD_INLINE void store_half(float* p, Vec a) { _mm512_mask_storeu_ps(p, 0xFF, a.x); }
SSD_INLINE void store_half(BFloat16* p, Vec a) {
  _mm512_mask_cvtepi32_storeu_epi16(p, 0xFF, _mm512_srli_epi32(round_to_bfloat16(a), 16));
}
SSD_INLINE void store_half(Float16* p, Vec a) {
  const __m256i narrow = _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(narrow));
}
SSD_INLINE void store(Int8* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.x)));
}
SSD_INLINE void store_half(Int8* p, Vec a) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.x)));
}
SSD_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
SSD_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
SSD_INLINE Vec divide(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
SSD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
// The second operand wins over a NaN, so clamp(x) keeps a NaN x.
SSD_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
SSD_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.x, b.x)}; }
SSD_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
SSD_INLINE Vec scale_by_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.x, n.x)}; }
SSD_INLINE Vec zero_where_below(Vec a, Vec x, Vec limit) {
  return {_mm512_mask_mov_ps(a.x, _mm512_cmp_ps_mask(x.x, limit.x, _CMP_LT_OQ), _mm512_setzero_ps())};
}
SSD_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.x); }
SSD_INLINE void sum_four(const Vec v[4], float* to) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0].x, v[1].x), _mm512_unpackhi_ps(v[0].x, v[1].x));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2].x, v[3].x), _mm512_unpackhi_ps(v[2].x, v[3].x));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
SSD_INLINE float highest(Vec a) { return _mm512_reduce_max_ps(a.x); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 x;
};
SSD_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
SSD_INLINE Vec broadcast(float a) { return {_mm256_set1_ps(a)}; }
SSD_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
SSD_INLINE Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
SSD_INLINE Vec load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
SSD_INLINE Vec load(const Int8* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
SSD_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.x); }
SSD_INLINE void load_pair(const BFloat16* p, Vec& a, Vec& b) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a = {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))};
  b = {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))))};
}
SSD_INLINE __m256i round_to_bfloat16(Vec a) {  // in the upper half of each lane
  const __m256i bits = _mm256_castps_si256(a.x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan);
}
SSD_INLINE void store_pair(BFloat16* p, Vec a, Vec b) {
  const __m256i high = _mm256_and_si256(round_to_bfloat16(b), _mm256_set1_epi32(static_cast<int>(0xFFFF0000)));
  const __m256i both = _mm256_or_si256(_mm256_srli_epi32(round_to_bfloat16(a), 16), high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
}
SSD_INLINE void store(BFloat16* p, Vec a) {
  const __m256i wide = _mm256_srli_epi32(round_to_bfloat16(a), 16);
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}
SSD_INLINE void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}
SSD_INLINE void store(Int8* p, Vec a) {
  const __m256i wide = _mm256_cvtps_epi32(a.x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
SSD_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
SSD_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
SSD_INLINE Vec divide(Vec a, Vec b) { return {_mm256_div_ps(a.x, b.x)}; }
SSD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
SSD_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.x, b.x)}; }
SSD_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.x, b.x)}; }
SSD_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
SSD_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.x), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
SSD_INLINE Vec zero_where_below(Vec a, Vec x, Vec limit) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.x, limit.x, _CMP_LT_OQ), a.x)};
}
SSD_INLINE float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
SSD_INLINE void sum_four(const Vec v[4], float* to) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0].x, v[1].x), _mm256_unpackhi_ps(v[0].x, v[1].x));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2].x, v[3].x), _mm256_unpackhi_ps(v[2].x, v[3].x));
  const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
SSD_INLINE float highest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

#else

struct Vec {
  static constexpr int kWidth = 8;
  float x[kWidth];
};
template <class F>
SSD_INLINE Vec each(F f) {
  Vec r;
  for (int i = 0; i < Vec::kWidth; ++i) r.x[i] = f(i);
  return r;
}
SSD_INLINE Vec broadcast(float a) {
  return each([&](int) { return a; });
}
SSD_INLINE Vec zero() { return broadcast(0.0f); }
template <class T>
SSD_INLINE Vec load(const T* p) {
  return each([&](int i) { return to_float(p[i]); });
}
SSD_INLINE void store(float* p, Vec a) { std::memcpy(p, a.x, sizeof a.x); }
template <class T>
SSD_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < Vec::kWidth; ++i) from_float(a.x[i], p + i);
}
SSD_INLINE Vec add(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] + b.x[i]; });
}
SSD_INLINE Vec mul(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] * b.x[i]; });
}
SSD_INLINE Vec divide(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] / b.x[i]; });
}
SSD_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
}
SSD_INLINE Vec max(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
SSD_INLINE Vec min(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
}
SSD_INLINE Vec round(Vec a) {
  // Adding and taking away 1.5 * 2^23 rounds any |a| < 2^22 to the nearest integer.
  constexpr float kMagic = 12582912.0f;
  return each([&](int i) { return (a.x[i] + kMagic) - kMagic; });
}
SSD_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  return each([&](int i) {
    const int32_t bits = n.x[i] == n.x[i] ? (static_cast<int32_t>(n.x[i]) + 127) * (1 << 23) : 0;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return a.x[i] * power;
  });
}
SSD_INLINE Vec zero_where_below(Vec a, Vec x, Vec limit) {
  return each([&](int i) { return x.x[i] < limit.x[i] ? 0.0f : a.x[i]; });
}
SSD_INLINE float sum(Vec a) {
  return ((a.x[0] + a.x[4]) + (a.x[2] + a.x[6])) + ((a.x[1] + a.x[5]) + (a.x[3] + a.x[7]));
}
SSD_INLINE void sum_four(const Vec v[4], float* to) {
  for (int i = 0; i < 4; ++i) to[i] = sum(v[i]);
}
SSD_INLINE float highest(Vec a) {
  float m = a.x[0];
  for (int i = 1; i < Vec::kWidth; ++i) m = a.x[i] > m ? a.x[i] : m;
  return m;
}

#endif

#if !defined(__AVX512F__)
template <class T>
SSD_INLINE Vec load_half(const T* p) {
  return load(p);
}
template <class T>
SSD_INLINE void store_half(T* p, Vec a) {
  store(p, a);
}
#endif

// In element order, unless an overload above knows better.
template <class T>
SSD_INLINE void load_pair(const T* p, Vec& a, Vec& b) {
  a = load(p);
  b = load(p + Vec::kWidth);
}
template <class T>
SSD_INLINE void store_pair(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + Vec::kWidth, b);
}

constexpr int64_t kLine = 64;

// How far ahead of its use memory is touched, in bytes: 0, and hardware prefetchers do it all. They run after loops
// that take a line soon after the other, and longer ones fall behind. What is best was measured (docs/benchmarks.md);
// with AVX-512 multiples of 4096 are up to a tenth worse than others beside them.
#if defined(__AVX512F__)
template <class T>
constexpr int64_t kAhead = sizeof(T) == 4   ? 5120
                           : sizeof(T) == 2 ? 0
                                            : 8704;
#elif defined(__AVX2__)
template <class T>
constexpr int64_t kAhead = sizeof(T) == 4   ? 0
                           : sizeof(T) == 2 ? 9216
                                            : 8704;
#else
template <class T>
constexpr int64_t kAhead = 9216;
#endif

// Keys whose dot products are taken together, a vector of each in turn: one, so that memory is read in order, unless
// widening takes longer than memory does.
template <class T>
constexpr int kKeysTogether = sizeof(T) == 1 ? 4 : 1;

// Touches what lies kAhead behind some elements, into the second-level cache: slots of the same head or the next one's.
template <class T>
SSD_INLINE void touch_ahead(const T* p, int64_t elements) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + kAhead<T>;
  for (int64_t byte = 0; kAhead<T> && byte < elements * static_cast<int64_t>(sizeof(T)); byte += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(at + byte), 0, 2);
}

// Compilers move no load across it, so that memory is read in the order in which it is written here.
SSD_INLINE void keep_order() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// exp(x) for x <= 0 to about 1 unit in the last place: 2^n * e^r with |r| <= ln(2) / 2. Exactly 0 below -87, where
// floats run out: a token that gets no attention must not collect score.
SSD_INLINE Vec exp_of_negative(Vec given) {
  const Vec lowest = broadcast(-87.0f);
  const Vec x = max(lowest, given);
  const Vec n = round(mul(x, broadcast(1.44269504f)));
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, broadcast(1.0f)));
  return zero_where_below(scale_by_power_of_two(p, n), given, lowest);
}

}  // namespace
}  // namespace ssd
