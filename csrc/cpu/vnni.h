// The inner loops over bytes where the processor multiplies bytes: four products and their sum in an instruction
// (AVX-512 VNNI), instead of a widening, a conversion and a multiply-add for every element.
//
// The other factor, a query or the weights of values, becomes whole numbers of 24 bits, multiples of a unit that its
// largest element decides; they are cut into three bytes, called digits here. So products and sums are exact, and what
// is rounded is about what rounding to floats would lose. A float32 query takes four digits: keys may be next to
// nothing where its largest element is, and then the others count.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/int8.h"
#include "cpu/decode.h"
#include "cpu/simd.h"

namespace ssd {
namespace {

#if defined(__AVX512VNNI__)

// Whether the factors of slots of type T are cut.
template <class T>
constexpr bool kInDigits = std::is_same<T, Int8>::value;

constexpr int kDigits = 3, kMostDigits = 4;
constexpr int kBlock = 64;               // bytes of a vector
constexpr float kWeightLimit = 16.7e6f;  // what digits from 0 to 255 can say, and a little less

// The same of a query's digits, from -128 to 127.
constexpr float query_limit(int digits) { return digits == kDigits ? 8.3e6f : 2.1e9f; }

// Elements [d, d + kBlock) of a vector of `dim` bytes, zeros behind its end.
SSD_INLINE __m512i load_block(const Int8* p, int dim, int d) {
  if (dim - d >= kBlock) return _mm512_loadu_si512(p + d);
  return _mm512_maskz_loadu_epi8((__mmask64{1} << (dim - d)) - 1, p + d);
}

// Where things lie in a query that has been cut.
struct CutQuery {
  int8_t* digits;  // [kMostDigits, blocks, kBlock]
  int blocks;

  CutQuery(float* q, int dim) : digits(reinterpret_cast<int8_t*>(q)), blocks((dim + kBlock - 1) / kBlock) {}
  SSD_ALWAYS_INLINE int8_t* digit(int which, int block) const { return digits + (which * blocks + block) * kBlock; }
  // Behind the digits: int32 [kMostDigits, 16], what sums start from, and how many digits there are.
  SSD_ALWAYS_INLINE int8_t* start(int which) const { return digits + (kMostDigits * blocks + which) * kBlock; }
  SSD_ALWAYS_INLINE int8_t& count() const { return *start(kMostDigits); }
};

// What floats are multiplied by to become whole numbers, by their largest magnitude: in two steps, so that neither
// overflows. A whole number n stands for n / most * unit. `unit` is NaN where a float is not finite; the numbers are 0
// then.
struct Cut {
  __m512 inverse, limit;
  float unit;

  Cut(int32_t largest, float most) {
    const float amax = float_of(static_cast<uint32_t>(largest));
    const bool usable = largest >= 1 << 23 && largest < 255 << 23;
    inverse = _mm512_set1_ps(usable ? 1.0f / amax : 0.0f);
    limit = _mm512_set1_ps(most);
    unit = usable ? amax : largest < 255 << 23 ? 0.0f : float_of(0x7FC00000);
  }
  SSD_ALWAYS_INLINE __m512i operator()(__m512 x) const {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_mul_ps(x, inverse), limit));
    return unit == unit ? whole : _mm512_setzero_si512();
  }
};

// Cuts a query of floats that came as X, in its place; returns the unit.
template <class X>
SSD_INLINE float cut_query(float* q, int dim) {
  constexpr int kCount = std::is_same<X, float>::value ? kMostDigits : kDigits;
  const CutQuery query(q, dim);
  const Cut cut(largest_magnitude(q, dim), query_limit(kCount));
  __m512i whole[kMaxHeadDim / 16];
  for (int d = 0; d < query.blocks * kBlock; d += 16) {
    const __mmask16 mask = dim - d >= 16 ? 0xFFFF : dim > d ? 0xFF : 0;
    whole[d / 16] = cut(_mm512_maskz_loadu_ps(mask, q + d));
  }
  query.count() = kCount;
  for (int which = 0; which < kCount; ++which) {
    for (int d = 0; d < query.blocks * kBlock; d += 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(query.digit(which, 0) + d), _mm512_cvtepi32_epi8(whole[d / 16]));
      whole[d / 16] = _mm512_srai_epi32(_mm512_add_epi32(whole[d / 16], _mm512_set1_epi32(128)), 8);
    }
    __m512i start = _mm512_setzero_si512();
    for (int block = 0; block < query.blocks; ++block)
      start = _mm512_dpbusd_epi32(start, _mm512_set1_epi8(-128), _mm512_loadu_si512(query.digit(which, block)));
    _mm512_storeu_si512(query.start(which), _mm512_sub_epi32(_mm512_setzero_si512(), start));
  }
  return cut.unit;
}

// Weights become whole numbers, int32, in their place; returns the unit.
template <class T>
SSD_INLINE float cut_weights(float* weights, int32_t count) {
  const Cut cut(largest_magnitude(weights, count), kWeightLimit);
  for (int32_t i = 0; i < count; i += 16) {
    const __mmask16 mask = count - i >= 16 ? 0xFFFF : (1u << (count - i)) - 1;
    _mm512_mask_storeu_epi32(weights + i, mask, cut(_mm512_maskz_loadu_ps(mask, weights + i)));
  }
  return cut.unit;
}

// A query that has been cut, in units of which its dot products are.
template <int kDim>
struct DigitQuery {
  CutQuery query;
  int dim;

  SSD_ALWAYS_INLINE DigitQuery(const float* q, int head_dim)
      : query(const_cast<float*>(q), kDim ? kDim : head_dim), dim(kDim ? kDim : head_dim) {}

  // q . key of kSlots consecutive slots, not summed over lanes.
  template <int kSlots>
  SSD_ALWAYS_INLINE void dots(const Int8* keys, Vec dot[kSlots]) const {
    query.count() == kMostDigits ? dots_in<kMostDigits, kSlots>(keys, dot) : dots_in<kDigits, kSlots>(keys, dot);
  }

  template <int kCount, int kSlots>
  SSD_ALWAYS_INLINE void dots_in(const Int8* keys, Vec dot[kSlots]) const {
    constexpr float kLimit = query_limit(kCount);
    __m512i sums[kSlots][kMostDigits];
    for (int u = 0; u < kSlots; ++u)
      for (int which = 0; which < kMostDigits; ++which)
        sums[u][which] = which < kCount ? _mm512_loadu_si512(query.start(which)) : _mm512_setzero_si512();
    for (int block = 0; block < query.blocks; ++block) {
      __m512i digits[kCount];
      for (int which = 0; which < kCount; ++which) digits[which] = _mm512_loadu_si512(query.digit(which, block));
      for (int u = 0; u < kSlots; ++u) {
        touch_ahead(keys + u * dim + block * kBlock, 1);
        // The instruction takes one factor without a sign: 128 is added here, and taken away by what sums start from.
        const __m512i key = _mm512_xor_si512(load_block(keys + u * dim, dim, block * kBlock), _mm512_set1_epi8(-128));
        for (int which = 0; which < kCount; ++which)
          sums[u][which] = _mm512_dpbusd_epi32(sums[u][which], key, digits[which]);
      }
    }
    for (int u = 0; u < kSlots; ++u) {
      const __m512i low = _mm512_add_epi32(sums[u][0], _mm512_slli_epi32(sums[u][1], 8));
      const __m512i high = _mm512_add_epi32(sums[u][2], _mm512_slli_epi32(sums[u][3], 8));
      const __m512 parts = _mm512_mul_ps(_mm512_cvtepi32_ps(low), _mm512_set1_ps(1 / kLimit));
      dot[u] = {_mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536 / kLimit), parts)};
    }
  }
};

// acc[0, 64) += sum over slots of p[slot] * value[slot] from column d on, in units of p, which are cut.
SSD_INLINE void accumulate_block(const float* p, const Int8* values, int count, int dim, int d, float* acc) {
  __m512i sums[4][kDigits];
  for (int j = 0; j < 4; ++j)
    for (int which = 0; which < kDigits; ++which) sums[j][which] = _mm512_setzero_si512();
  const auto add_four = [&](const Int8* row, int b_at, int c_at, int e_at,
                            __m128i four) __attribute__((always_inline)) {
    for (int i = 0; i < 4; ++i) touch_ahead(row + i * dim + d, 1);
    const __m512i a = load_block(row, dim, d), b = load_block(row + b_at, dim, d);
    const __m512i c = load_block(row + c_at, dim, d), e = load_block(row + e_at, dim, d);
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i ce_low = _mm512_unpacklo_epi8(c, e), ce_high = _mm512_unpackhi_epi8(c, e);
    const __m512i columns[4] = {_mm512_unpacklo_epi16(ab_low, ce_low), _mm512_unpackhi_epi16(ab_low, ce_low),
                                _mm512_unpacklo_epi16(ab_high, ce_high), _mm512_unpackhi_epi16(ab_high, ce_high)};
    const __m512i weights = _mm512_broadcast_i32x4(four);
    for (int which = 0; which < kDigits; ++which) {
      const __m512i pick = _mm512_set1_epi32(0x0C080400 + which * 0x01010101);
      const __m512i digits = _mm512_shuffle_epi8(weights, pick);
      for (int j = 0; j < 4; ++j) sums[j][which] = _mm512_dpbusd_epi32(sums[j][which], digits, columns[j]);
    }
  };
  int slot = 0;
  for (; slot + 4 <= count; slot += 4)
    add_four(values + slot * dim, dim, 2 * dim, 3 * dim, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + slot)));
  if (slot < count) {
    const int last = count - slot - 1;
    add_four(values + slot * dim, smaller(last, 1) * dim, smaller(last, 2) * dim, 0,
             _mm_maskz_loadu_epi32((2 << last) - 1, p + slot));
  }
  __m512 total[4];
  for (int j = 0; j < 4; ++j) {
    total[j] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[j][0]), _mm512_set1_ps(1 / kWeightLimit));
    total[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[j][1]), _mm512_set1_ps(256 / kWeightLimit), total[j]);
    total[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[j][2]), _mm512_set1_ps(65536 / kWeightLimit), total[j]);
  }
  // Lane l of vector j has the columns from 16 * l + 4 * j on.
  const __m512 a = _mm512_shuffle_f32x4(total[0], total[1], 0x44), b = _mm512_shuffle_f32x4(total[2], total[3], 0x44);
  const __m512 c = _mm512_shuffle_f32x4(total[0], total[1], 0xEE), e = _mm512_shuffle_f32x4(total[2], total[3], 0xEE);
  const __m512 columns[4] = {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD),
                             _mm512_shuffle_f32x4(c, e, 0x88), _mm512_shuffle_f32x4(c, e, 0xDD)};
  for (int l = 0; l < 4; ++l) {
    const int left = dim - d - 16 * l;
    const __mmask16 mask = left >= 16 ? 0xFFFF : left > 0 ? 0xFF : 0;
    float* at = acc + 16 * l;
    _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), columns[l]));
  }
}

template <int kDim>
SSD_INLINE void accumulate_slots(const float* p, const Int8* values, int count, int head_dim, float* acc) {
  const int dim = kDim ? kDim : head_dim;
  for (int d = 0; d < dim; d += kBlock) accumulate_block(p, values, count, dim, d, acc + d);
}

#else

template <class T>
constexpr bool kInDigits = false;
template <int kDim>
struct DigitQuery;
template <class X>
float cut_query(float* q, int dim);
template <class T>
float cut_weights(float* weights, int32_t count);

#endif

}  // namespace
}  // namespace ssd
