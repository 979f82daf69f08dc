// The inner loops: a few slots at a time, in vectors. They call pace(bytes) as they read, so that memory ahead is
// touched a little at a time: a burst would fill the processor's queue of misses and hold up everything else.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/int8.h"
#include "cpu/simd.h"
#include "cpu/vnni.h"

namespace ssd {
namespace {

// Slots scored or accumulated together: in digits more, for their sums become floats once per tile.
template <class T>
constexpr int kTile = kInDigits<T> ? 32 : 8;

// dot[u] += q . keys[u] over head_dim elements, for kSlots slots `dim` apart.
template <int kSlots, class T, class Pace>
SSD_INLINE void dot_slots(const float* q, const T* keys, int dim, Vec dot[kSlots], Pace pace) {
  int d = 0;
  for (; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth) {
    pace(kSlots * 2 * Vec::kWidth * sizeof(T));
    const Vec qa = load(q + d), qb = load(q + d + Vec::kWidth);
    for (int u = 0; u < kSlots; ++u) {
      Vec a, b;
      load_pair(keys + u * dim + d, a, b);
      dot[u] = fma(qb, b, fma(qa, a, dot[u]));
    }
  }
  if (d < dim) pace(kSlots * (dim - d) * sizeof(T));
  for (; d + Vec::kWidth <= dim; d += Vec::kWidth)
    for (int u = 0; u < kSlots; ++u) dot[u] = fma(load(q + d), load(keys + u * dim + d), dot[u]);
  if (d < dim)
    for (int u = 0; u < kSlots; ++u) dot[u] = fma(load_half(q + d), load_half(keys + u * dim + d), dot[u]);
}

// logits[0, count) = q . k for `count` consecutive slots. kDim 0 takes the head_dim at run time.
template <int kDim, class T, class Pace>
SSD_INLINE void score_tile(const float* q, const T* keys, int count, int head_dim, float* logits, Pace pace) {
  const int dim = kDim ? kDim : head_dim;
  int slot = 0;
  for (; slot + 4 <= count; slot += 4) {
    Vec dot[4] = {zero(), zero(), zero(), zero()};
    dot_slots<4>(q, keys + static_cast<int64_t>(slot) * dim, dim, dot, pace);
    sum_four(dot, logits + slot);
  }
  for (; slot < count; ++slot) {
    Vec dot[1] = {zero()};
    dot_slots<1>(q, keys + static_cast<int64_t>(slot) * dim, dim, dot, pace);
    logits[slot] = sum(dot[0]);
  }
}

// acc[0, 2 * kPairs * width) += sum over slots of p[slot] * value[slot].
template <int kPairs, class T, class Pace>
SSD_INLINE void accumulate_block(const float* p, const T* values, int count, int dim, float* acc, Pace pace) {
  Vec total[2 * kPairs];
  for (int i = 0; i < 2 * kPairs; ++i) total[i] = load(acc + i * Vec::kWidth);
  for (int slot = 0; slot < count; ++slot) {
    pace(2 * kPairs * Vec::kWidth * sizeof(T));
    const Vec weight = broadcast(p[slot]);
    const T* value = values + static_cast<int64_t>(slot) * dim;
    for (int i = 0; i < kPairs; ++i) {
      Vec a, b;
      load_pair(value + 2 * i * Vec::kWidth, a, b);
      total[2 * i] = fma(weight, a, total[2 * i]);
      total[2 * i + 1] = fma(weight, b, total[2 * i + 1]);
    }
  }
  for (int i = 0; i < 2 * kPairs; ++i) store(acc + i * Vec::kWidth, total[i]);
}

template <int kDim, class T, class Pace>
SSD_INLINE void accumulate_tile(const float* p, const T* values, int count, int head_dim, float* acc, Pace pace) {
  const int dim = kDim ? kDim : head_dim;
  constexpr int kPairs = 4;  // 8 accumulators fit the registers of every instruction set
  int d = 0;
  for (; d + 2 * kPairs * Vec::kWidth <= dim; d += 2 * kPairs * Vec::kWidth)
    accumulate_block<kPairs>(p, values + d, count, dim, acc + d, pace);
  for (; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth)
    accumulate_block<1>(p, values + d, count, dim, acc + d, pace);
  if (d < dim) pace(count * (dim - d) * sizeof(T));
  for (; d < dim; d += Vec::kWidth) {
    const bool half = d + Vec::kWidth > dim;
    Vec total = half ? load_half(acc + d) : load(acc + d);
    for (int slot = 0; slot < count; ++slot) {
      const T* value = values + static_cast<int64_t>(slot) * dim + d;
      total = fma(broadcast(p[slot]), half ? load_half(value) : load(value), total);
    }
    half ? store_half(acc + d, total) : store(acc + d, total);
  }
}

// to[i] *= factor * factors[i].
SSD_INLINE void multiply(float factor, const float* __restrict factors, int count, float* __restrict to) {
  for (int i = 0; i < count; ++i) to[i] *= factor * factors[i];
}

// `dim` elements times `factor`, widened into the lane order of Slot.
template <class Slot, class T>
SSD_INLINE void widen(const T* from, int dim, float factor, float* to) {
  const Vec scale = broadcast(factor);
  int d = 0;
  for (; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth) {
    Vec a, b;
    if constexpr (std::is_same<Slot, T>::value) {
      load_pair(from + d, a, b);
    } else {
      static_assert(std::is_same<Slot, Int8>::value, "bytes are in element order");
      a = load(from + d);
      b = load(from + d + Vec::kWidth);
    }
    store(to + d, mul(a, scale));
    store(to + d + Vec::kWidth, mul(b, scale));
  }
  for (; d + Vec::kWidth <= dim; d += Vec::kWidth) store(to + d, mul(load(from + d), scale));
  if (d < dim) store_half(to + d, mul(load_half(from + d), scale));
}

// The way back: `dim` floats in the lane order of Slot times `factor`, rounded to T in element order.
template <class Slot, class T>
SSD_INLINE void narrow(const float* from, int dim, float factor, T* to) {
  const Vec scale = broadcast(factor);
  int d = 0;
  for (; std::is_same<Slot, T>::value && d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth)
    store_pair(to + d, mul(load(from + d), scale), mul(load(from + d + Vec::kWidth), scale));
  for (; d + Vec::kWidth <= dim; d += Vec::kWidth) store(to + d, mul(load(from + d), scale));
  if (d < dim) store_half(to + d, mul(load_half(from + d), scale));
}

// Bytes of a vector of floats; returns their scale.
SSD_INLINE float quantise(const float* x, int dim, Int8* to) {
  const ByteScale found = byte_scale(largest_magnitude(x, dim));
  if (found.inverse == 0.0f)
    std::memset(to, 0, static_cast<size_t>(dim));
  else
    narrow<Int8>(x, dim, found.inverse, to);
  return found.scale;
}

// logits[0, padded) become exp(logit - max); returns 1 / their sum over [0, count).
SSD_INLINE float softmax_numerators(float* logits, int32_t count, int32_t padded) {
  for (int32_t i = count; i < padded; ++i) logits[i] = -INFINITY;
  Vec top = broadcast(-INFINITY);
  for (int32_t i = 0; i < padded; i += Vec::kWidth) top = max(top, load(logits + i));
  const Vec shift = broadcast(-highest(top));
  Vec total = zero();
  for (int32_t i = 0; i < padded; i += Vec::kWidth) {
    const Vec p = exp_of_negative(add(load(logits + i), shift));
    total = add(total, p);
    store(logits + i, p);
  }
  return 1.0f / sum(total);
}

}  // namespace
}  // namespace ssd
