// Registers hold bits; arithmetic happens in the C++ type that an instruction names.
#pragma once

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "common/float16.h"
#include "program.h"

namespace ptx {

template <class To, class From>
To cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline int bits_of(Type type) { return type == Type::kPred ? 1 : 8 * bytes_of(type); }
inline uint64_t ones(int bits) { return bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }
// The lowest bits, extended by their sign.
inline uint64_t extend(uint64_t value, int bits) {
  return static_cast<uint64_t>(static_cast<int64_t>(value << (64 - bits)) >> (64 - bits));
}

template <class T>
T from_bits(uint64_t bits) {
  if constexpr (std::is_same_v<T, float>)
    return cast<float>(static_cast<uint32_t>(bits));
  else if constexpr (std::is_same_v<T, double>)
    return cast<double>(bits);
  else
    return static_cast<T>(bits);
}
template <class T>
uint64_t to_bits(T value) {
  if constexpr (std::is_same_v<T, float>)
    return cast<uint32_t>(value);
  else if constexpr (std::is_same_v<T, double>)
    return cast<uint64_t>(value);
  else
    return static_cast<std::make_unsigned_t<T>>(value);
}

inline float bfloat_to_float(uint16_t bits) { return cast<float>(static_cast<uint32_t>(bits) << 16); }
// To nearest, of two equally near ones the even one.
inline uint16_t float_to_bfloat(float x) {
  if (x != x) return 0x7FFF;
  const uint32_t bits = cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Calls body(T{}) with the C++ type that computes in `type`; false if there is none.
template <class F>
bool with_integer(Type type, F body) {
  switch (type) {
    case Type::kU8:
    case Type::kB8:
    case Type::kPred:
      return body(uint8_t{}), true;
    case Type::kS8:
      return body(int8_t{}), true;
    case Type::kU16:
    case Type::kB16:
      return body(uint16_t{}), true;
    case Type::kS16:
      return body(int16_t{}), true;
    case Type::kU32:
    case Type::kB32:
      return body(uint32_t{}), true;
    case Type::kS32:
      return body(int32_t{}), true;
    case Type::kU64:
    case Type::kB64:
      return body(uint64_t{}), true;
    case Type::kS64:
      return body(int64_t{}), true;
    default:
      return false;
  }
}
template <class F>
bool with_type(Type type, F body) {
  if (type == Type::kF32) return body(float{}), true;
  if (type == Type::kF64) return body(double{}), true;
  return with_integer(type, body);
}

}  // namespace ptx
