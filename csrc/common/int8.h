// Vectors in 8 bits: bytes and a scale (docs/specification.md, section 3.13). Contents are the same bit by bit on every
// backend: one division for the scale, one for its inverse, one product for every element, each rounded.
#pragma once

#include <cstdint>

#include "common/float16.h"
#include "common/layout.h"

namespace ssd {

// An element is read as byte * scale; its byte is the nearest integer to element * inverse, of two the even one.
struct ByteScale {
  float scale;
  float inverse;
};

// The bits of the largest magnitude in a vector, which order like the magnitudes; NaN is above all.
SSD_INLINE int32_t largest_magnitude(const float* x, int count) {
  int32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(x[i]) & 0x7FFFFFFF);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The scale of a vector by its largest magnitude. Where it is no normal float it becomes 0, and where an element is not
// finite NaN; the inverse is 0 then, which stands for bytes of 0. No |element * inverse| rounds to more than 127.
SSD_INLINE ByteScale byte_scale(int32_t largest) {
  if (largest >= 255 << 23) return {float_of(0x7FC00000), 0.0f};
  const float amax = float_of(static_cast<uint32_t>(largest)), scale = amax / 127.0f;
  if (bits_of(scale) < 1u << 23) return {0.0f, 0.0f};
  return {scale, 127.0f / amax};
}

}  // namespace ssd
