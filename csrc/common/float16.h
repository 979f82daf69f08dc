// float16 by its bits, for compilers without a type for it. No step yields a subnormal float, so that the results do
// not depend on whether the processor flushes those to zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/layout.h"

namespace ssd {

SSD_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
SSD_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The float of a float16, exactly. A NaN becomes a quiet one.
SSD_INLINE float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFF) << 13;
  uint32_t bits = magnitude + (112u << 23);  // exponents count from 127 instead of 15
  if (magnitude >= 31u << 23) {
    bits += 112u << 23;
    if (magnitude > 31u << 23) bits |= 1u << 22;
  } else if (magnitude < 1u << 23) {
    // A subnormal has no leading 1: it is given one, which is then taken away.
    bits = bits_of(float_of(bits + (1u << 23)) - float_of(113u << 23));
  }
  return float_of(sign | bits);
}

// The float16 nearest to a float, of two equally near ones the even one. A NaN becomes a quiet one.
SSD_INLINE uint16_t float_to_float16(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000;
  const uint32_t magnitude = bits_of(value) & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude > 255u << 23) {
    half = 0x7E00 | (magnitude >> 13 & 0x3FF);
  } else if (magnitude >= 143u << 23) {  // 2^16 and more
    half = 0x7C00;
  } else if (magnitude < 113u << 23) {
    // Below 2^-14 a step is 2^-24, which is the step of floats from 0.5 on: adding 0.5 rounds.
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    // May carry into the exponent, and from the largest one to infinity.
    half = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

}  // namespace ssd
