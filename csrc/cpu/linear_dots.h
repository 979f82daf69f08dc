// How weights of each type are multiplied with x of each type (linear_kernels.h), for one instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace ssd {
namespace {

// A Dot says how weights are multiplied: kStep at a time, with a tile of up to kRows rows of x, staged as `Staged`, and
// whether so many rows, at most kStreamed, of `in` elements are faster streamed (linear_kernels.h), as measured on a
// Zen 4.
//
// This one makes floats of weights of any type, one vector at a time.
struct FloatDot {
  using Staged = float;
  using Loaded = Vec;
  using Sum = Vec;
  static constexpr int kStep = Vec::kWidth;
  static constexpr int kRows = Vec::kWidth == 16 ? 6 : 3;
  static constexpr int kStreamed = 2;
  static constexpr bool kWidens = false;

  template <class W>
  static bool streams(int32_t rows, int32_t) {
    return rows == 1 || (rows == 2 && Vec::kWidth == 16 && sizeof(W) == sizeof(float));
  }
  template <class W>
  SSD_ALWAYS_INLINE static Loaded loaded(const W* w) {
    return load(w);
  }
  SSD_ALWAYS_INLINE static Sum none() { return zero(); }
  SSD_ALWAYS_INLINE static Sum add(Loaded w, const float* x, Sum sum) { return fma(w, load(x), sum); }
  SSD_ALWAYS_INLINE static void total_four(const Sum sums[4], float* to) { sum_four(sums, to); }
  SSD_ALWAYS_INLINE static void stage(const float* from, float* to) { store(to, load(from)); }
};

// How x of type T is multiplied with weights of type W.
template <class T, class W>
struct Dot : FloatDot {};

#if defined(__AVX512BF16__)
// In vectors of half the width: on a Zen 4 as many products in a cycle, and with 4 and 8 rows 1.2 and 1.3 times as fast
// as in whole ones.
template <>
struct Dot<BFloat16, BFloat16> {
  using Staged = BFloat16;
  using Loaded = __m256bh;
  using Sum = __m256;
  static constexpr int kStep = 16;
  static constexpr int kRows = 6;
  static constexpr int kStreamed = 3;
  static constexpr bool kWidens = false;

  template <class W>
  static bool streams(int32_t rows, int32_t in) {
    return rows <= 2 || (rows == 3 && in <= 2560);
  }
  SSD_ALWAYS_INLINE static Loaded loaded(const BFloat16* w) {
    return (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  }
  SSD_ALWAYS_INLINE static Sum none() { return _mm256_setzero_ps(); }
  SSD_ALWAYS_INLINE static Sum add(Loaded w, const BFloat16* x, Sum sum) { return _mm256_dpbf16_ps(sum, w, loaded(x)); }
  SSD_ALWAYS_INLINE static void total_four(const Sum v[4], float* to) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
  SSD_ALWAYS_INLINE static void stage(const float* from, BFloat16* to) { store(to, load(from)); }
};

// Upper bytes of bfloat16, which holds a signed byte exactly, and lower ones, for magnitudes of bytes.
struct ByteTables {
  uint8_t low[128] = {};   // of m; 128 has that of 0
  uint8_t high[128] = {};  // of 2 m and of 2 m + 1; of 1 for m = 0

  static constexpr int bits(int whole) {
    int exponent = 0;
    while (whole >> exponent > 1) ++exponent;
    return whole == 0 ? 0 : (127 + exponent) << 7 | ((whole << (7 - exponent)) & 0x7F);
  }
  constexpr ByteTables() {
    for (int m = 0; m < 128; ++m) low[m] = static_cast<uint8_t>(bits(m) & 0xFF);
    for (int m = 0; m <= 64; ++m) high[m] = static_cast<uint8_t>(bits(m == 0 ? 1 : 2 * m) >> 8);
  }
};
alignas(64) constexpr ByteTables kByteTables;

// Bytes become bfloat16 by two look-ups: with 2 rows that takes 0.8 times as long as the fastest way by floats. For
// several tiles they are widened once.
template <>
struct Dot<BFloat16, Int8> {
  using Staged = BFloat16;
  struct Loaded {
    __m512bh a, b;
  };
  using Sum = __m512;
  static constexpr int kStep = 64;
  static constexpr int kRows = 6;
  static constexpr int kStreamed = 2;
  static constexpr bool kWidens = true;

  template <class W>
  static bool streams(int32_t rows, int32_t in) {
    return rows <= 2 && in <= 3072;
  }
  SSD_ALWAYS_INLINE static __m512i bits(const void* p) { return _mm512_loadu_si512(p); }
  // a: the first eight of every 16 weights; b: the others.
  SSD_ALWAYS_INLINE static Loaded loaded(const Int8* w) {
    const __m512i value = bits(w), size = _mm512_abs_epi8(value);
    const __m512i low = _mm512_permutex2var_epi8(bits(kByteTables.low), size, bits(kByteTables.low + 64));
    const __m512i high = _mm512_maskz_permutex2var_epi8(_mm512_test_epi8_mask(value, value), bits(kByteTables.high),
                                                        _mm512_srli_epi16(size, 1), bits(kByteTables.high + 64));
    const __m512i sign = _mm512_and_si512(value, _mm512_set1_epi8(-128));
    const __m512i signed_high = _mm512_or_si512(high, sign);
    return {(__m512bh)_mm512_unpacklo_epi8(low, signed_high), (__m512bh)_mm512_unpackhi_epi8(low, signed_high)};
  }
  SSD_ALWAYS_INLINE static Loaded loaded(const BFloat16* w) { return {(__m512bh)bits(w), (__m512bh)bits(w + 32)}; }
  SSD_ALWAYS_INLINE static void widen(const Int8* from, BFloat16* to) {
    const Loaded both = loaded(from);
    _mm512_storeu_si512(to, (__m512i)both.a);
    _mm512_storeu_si512(to + 32, (__m512i)both.b);
  }
  SSD_ALWAYS_INLINE static Sum none() { return _mm512_setzero_ps(); }
  SSD_ALWAYS_INLINE static Sum add(Loaded w, const BFloat16* x, Sum sum) {
    const Loaded both = loaded(x);
    return _mm512_dpbf16_ps(_mm512_dpbf16_ps(sum, w.a, both.a), w.b, both.b);
  }
  SSD_ALWAYS_INLINE static void total_four(const Sum v[4], float* to) {
    const Vec sums[4] = {{v[0]}, {v[1]}, {v[2]}, {v[3]}};
    sum_four(sums, to);
  }
  SSD_ALWAYS_INLINE static void stage(const float* from, BFloat16* to) {
    for (int i = 0; i < 4; ++i) {
      BFloat16 some[16];
      store(some, load(from + 16 * i));
      std::memcpy(to + 8 * i, some, sizeof some / 2);
      std::memcpy(to + 32 + 8 * i, some + 8, sizeof some / 2);
    }
  }
};
#endif

}  // namespace
}  // namespace ssd
