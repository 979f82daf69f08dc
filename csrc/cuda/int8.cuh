// Vectors as signed bytes with one scale each: docs/specification.md, section 3.13.
//
// Products with bytes are exact: a query's elements are integers, of whose three or four digits each has a multiply-add
// of four bytes at once, which takes less than a quarter of the instructions of floats.
#pragma once

#include <cfloat>
#include <type_traits>

#include "cuda/decode.h"
#include "cuda/port.cuh"

namespace ssd::cuda {

// Calls f with a value of the type of q, k, v and the output: the slots' type, unless that is bytes.
template <class T, class F>
SSD_DEVICE void with_type(DType dtype, F f) {
  if constexpr (!std::is_same_v<T, Int8>)
    f(T{});
  else if (dtype == kBFloat16)
    f(BFloat16{});
  else if (dtype == kFloat16)
    f(Float16{});
  else
    f(float{});
}

// A vector as a warp holds it: lane l has elements 4 l .. 4 l + 3, and those 128 further if there are.
template <int kWidth>
struct WarpVector {
  static constexpr int kQuads = (kWidth + 4 * port::kWarp - 1) / (4 * port::kWarp);
  float x[kQuads][4];

  SSD_DEVICE static int32_t first(int quad) { return 4 * (port::lane_index() + quad * port::kWarp); }

  // `get(e, to)`: the four elements from e on.
  template <class Get>
  SSD_DEVICE void load(int32_t dim, Get get) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[quad][i] = 0.0f;
      if (first(quad) < dim) get(first(quad), x[quad]);
    }
  }
  // Its bytes to where one starts.
  SSD_DEVICE static void store(const uint32_t words[kQuads], int32_t dim, void* to) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad)
      if (first(quad) < dim) static_cast<uint32_t*>(to)[first(quad) / 4] = words[quad];
  }

  // The bits of the largest magnitude. They sort like what they stand for, with infinity and then NaN last.
  SSD_DEVICE int32_t magnitude() const {
    int32_t largest = 0;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad)
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = larger(largest, port::bits_of(x[quad][i]) & INT32_MAX);
    for (int mask = port::kWarp / 2; mask > 0; mask /= 2) largest = larger(largest, port::shuffle_xor(largest, mask));
    return largest;
  }

  // As it is stored: bytes, and returns the scale. A vector without a scale that is a normal number is stored as zeros.
  SSD_DEVICE float quantise(uint32_t words[kQuads]) const {
    constexpr float kLargest = 127.0f;
    const int32_t bits = magnitude();
    const float amax = port::float_of(bits);
    const bool usable = bits <= kFiniteBits && amax >= kLargest * FLT_MIN;
    const float inverse = kLargest / (usable ? amax : kLargest);
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      uint32_t bytes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t rounded = port::nearest(usable ? x[quad][i] * inverse : 0.0f);
        bytes[i] = static_cast<uint32_t>(larger(smaller(rounded, 127), -127)) & 255;
      }
      words[quad] = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24;
    }
    return usable ? amax / kLargest : bits <= kFiniteBits ? 0.0f : port::float_of(kNaNBits);
  }

  // As 256ths of a power of two, in digits: word d of a quad has digit d, from -128 to 127, of its four elements, the
  // 256ths first: without those, elements are rounded to multiples of the power. Returns the power: 2^22 times it is
  // more than the largest magnitude; NaN if that is not finite.
  SSD_DEVICE float digits(uint32_t words[kQuads][kQueryDigits]) const {
    constexpr int kBits = 21, kMantissa = 23, kBias = 127;
    const int32_t bits = magnitude(), exponent = larger(bits >> kMantissa, kBits + 1);
    const float inverse = port::float_of((kBits + 2 * kBias - exponent) << kMantissa);
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      uint32_t n[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)  // a digit of 128 and more is one below 0, and 1 more for the next
        n[i] = (static_cast<uint32_t>(port::nearest(x[quad][i] * inverse * 256.0f)) + 0x808080u) ^ 0x808080u;
      const uint32_t low01 = port::permute(n[0], n[1], 0x5140), low23 = port::permute(n[2], n[3], 0x5140);
      const uint32_t high01 = port::permute(n[0], n[1], 0x7362), high23 = port::permute(n[2], n[3], 0x7362);
      words[quad][0] = port::permute(low01, low23, 0x5410);
      words[quad][1] = port::permute(low01, low23, 0x7632);
      words[quad][2] = port::permute(high01, high23, 0x5410);
      words[quad][3] = port::permute(high01, high23, 0x7632);
    }
    return port::float_of(bits <= kFiniteBits ? (exponent - kBits) << kMantissa : kNaNBits);
  }

 private:
  static constexpr int32_t kFiniteBits = 0x7F7FFFFF, kNaNBits = 0x7FC00000;
};

}  // namespace ssd::cuda
