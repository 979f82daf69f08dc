// The inner loops over slots, in vectors. Memory is read in the order of its addresses, which hardware prefetchers
// follow, or touched ahead of its use where a loop takes so long that they fall behind (docs/benchmarks.md).
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
constexpr int kTile = kInDigits<T> ? 32 : 16;

// A query: in registers if they hold it beside what a dot product takes.
template <int kDim, class T>
struct FloatQuery {
  static constexpr int kVectors = kDim / Vec::kWidth;
  static constexpr bool kHeld = Vec::kWidth == 16 && kVectors % 2 == 0 && 0 < kVectors && kVectors <= 8;
  const float* q;
  int dim;
  Vec held[kHeld ? kVectors : 1];

  SSD_ALWAYS_INLINE FloatQuery(const float* q, int head_dim) : q(q), dim(kDim ? kDim : head_dim) {
    for (int i = 0; kHeld && i < kVectors; ++i) held[i] = load(q + i * Vec::kWidth);
  }
  SSD_ALWAYS_INLINE Vec at(int d) const { return kHeld ? held[d / Vec::kWidth] : load(q + d); }

  // q . key of kSlots consecutive slots, not summed over lanes.
  template <int kSlots>
  SSD_ALWAYS_INLINE void dots(const T* keys, Vec dot[kSlots]) const {
    Vec other[kSlots];
    for (int u = 0; u < kSlots; ++u) dot[u] = other[u] = zero();
    int d = 0;
    for (; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth) {
      for (int u = 0; u < kSlots; ++u) {
        Vec a, b;
        load_pair(keys + u * dim + d, a, b);
        dot[u] = fma(at(d), a, dot[u]);
        other[u] = fma(at(d + Vec::kWidth), b, other[u]);
      }
    }
    for (; d + Vec::kWidth <= dim; d += Vec::kWidth)
      for (int u = 0; u < kSlots; ++u) dot[u] = fma(at(d), load(keys + u * dim + d), dot[u]);
    for (int u = 0; u < kSlots; ++u) {
      if (d < dim) dot[u] = fma(load_half(q + d), load_half(keys + u * dim + d), dot[u]);
      dot[u] = add(dot[u], other[u]);
    }
  }
};

template <int kDim, class T>
using Query = std::conditional_t<kInDigits<T>, DigitQuery<kDim>, FloatQuery<kDim, T>>;

// logits[0, count) = q . k for `count` consecutive slots. kDim 0 takes the head_dim at run time.
template <int kDim, class T>
SSD_INLINE void score_slots(const float* q, const T* keys, int count, int head_dim, float* logits) {
  constexpr int kTogether = kKeysTogether<T>;
  const Query<kDim, T> query(q, head_dim);
  const int64_t dim = query.dim;
  int slot = 0;
  for (; slot + 4 <= count; slot += 4) {
    Vec dot[4];
    for (int u = 0; u < 4; u += kTogether) {
      if (!kInDigits<T>) touch_ahead(keys + (slot + u) * dim, kTogether * dim);  // digits do it themselves
      query.template dots<kTogether>(keys + (slot + u) * dim, dot + u);
      keep_order();
    }
    sum_four(dot, logits + slot);
  }
  for (; slot < count; ++slot) {
    Vec dot[4] = {zero(), zero(), zero(), zero()};
    float sums[4];
    if (!kInDigits<T>) touch_ahead(keys + slot * dim, dim);
    query.template dots<1>(keys + slot * dim, dot);
    sum_four(dot, sums);
    logits[slot] = sums[0];
  }
}

// acc[0, 2 * kPairs * width) += sum over slots of p[slot] * value[slot].
template <int kPairs, class T>
SSD_INLINE void accumulate_block(const float* p, const T* values, int count, int dim, float* acc) {
  Vec total[2 * kPairs];
  for (int i = 0; i < 2 * kPairs; ++i) total[i] = load(acc + i * Vec::kWidth);
  for (int slot = 0; slot < count; ++slot) {
    const Vec weight = broadcast(p[slot]);
    const T* value = values + static_cast<int64_t>(slot) * dim;
    touch_ahead(value, 2 * kPairs * Vec::kWidth);
    for (int i = 0; i < kPairs; ++i) {
      Vec a, b;
      load_pair(value + 2 * i * Vec::kWidth, a, b);
      total[2 * i] = fma(weight, a, total[2 * i]);
      total[2 * i + 1] = fma(weight, b, total[2 * i + 1]);
    }
    keep_order();
  }
  for (int i = 0; i < 2 * kPairs; ++i) store(acc + i * Vec::kWidth, total[i]);
}

template <class T>
SSD_INLINE void accumulate_columns(const float* p, const T* values, int count, int dim, float* acc) {
  constexpr int kPairs = 4;  // 8 accumulators fit the registers of every instruction set
  int d = 0;
  for (; d + 2 * kPairs * Vec::kWidth <= dim; d += 2 * kPairs * Vec::kWidth)
    accumulate_block<kPairs>(p, values + d, count, dim, acc + d);
  for (; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth) accumulate_block<1>(p, values + d, count, dim, acc + d);
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

// acc[0, head_dim) += sum over `count` consecutive slots of p[slot] * value[slot].
template <int kDim, class T>
SSD_INLINE void accumulate_slots(const float* p, const T* values, int count, int head_dim, float* acc) {
  const int dim = kDim ? kDim : head_dim;
  if (dim <= 8 * Vec::kWidth) return accumulate_columns(p, values, count, dim, acc);
  // Registers hold a part of the columns: a kilobyte of slots at a time, so that the rest is read soon after it.
  const int some = larger(1024 / (dim * static_cast<int>(sizeof(T))), 1);
  for (int slot = 0; slot < count; slot += some)
    accumulate_columns(p + slot, values + static_cast<int64_t>(slot) * dim, smaller(some, count - slot), dim, acc);
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

// logits[0, padded) become exp(logit - max), not all at once: values that are ready can be read meanwhile.
class Softmax {
 public:
  SSD_ALWAYS_INLINE Softmax(float* logits, int32_t count, int32_t padded) : logits_(logits), total_(zero()) {
    for (int32_t i = count; i < padded; ++i) logits[i] = -INFINITY;
    Vec top = broadcast(-INFINITY);
    for (int32_t i = 0; i < padded; i += Vec::kWidth) top = max(top, load(logits + i));
    shift_ = broadcast(-highest(top));
  }
  // The first `count` at least are ready then.
  SSD_ALWAYS_INLINE void advance(int32_t count) {
    for (; ready_ < count; ready_ += Vec::kWidth) {
      const Vec p = exp_of_negative(add(load(logits_ + ready_), shift_));
      total_ = add(total_, p);
      store(logits_ + ready_, p);
    }
  }
  // 1 / the sum of all, when all are ready.
  SSD_ALWAYS_INLINE float inverse() const { return 1.0f / sum(total_); }

 private:
  float* logits_;
  Vec shift_, total_;
  int32_t ready_ = 0;
};

}  // namespace
}  // namespace ssd
