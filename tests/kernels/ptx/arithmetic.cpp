// Numbers: sums, products, comparisons and functions.
#include "step.h"

namespace ptx {
namespace {

template <class T>
constexpr bool kIsFloat = std::is_floating_point_v<T>;

// d = body(a, b) in the instruction's type.
template <class F>
bool binary(Step& step, F body) {
  const uint64_t *a = step.read(1), *b = step.read(2);
  uint64_t* d = step.write();
  return with_type(step.in.type, [&](auto tag) {
    using T = decltype(tag);
    for_lanes(step.lanes, [&](int l) { d[l] = to_bits<T>(body(from_bits<T>(a[l]), from_bits<T>(b[l]))); });
  });
}

template <class F>
bool unary(Step& step, F body) {
  const uint64_t* a = step.read(1);
  uint64_t* d = step.write();
  return with_type(step.in.type, [&](auto tag) {
    using T = decltype(tag);
    for_lanes(step.lanes, [&](int l) { d[l] = to_bits<T>(body(from_bits<T>(a[l]))); });
  });
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// Approximations are exact here: what hardware gives may differ in the last places.
template <class F>
bool function(Step& step, F body) {
  if (step.in.type != Type::kF32) return false;
  const bool flush = step.in.flush;
  const uint64_t* a = step.read(1);
  uint64_t* d = step.write();
  for_lanes(step.lanes, [&](int l) {
    const float x = from_bits<float>(a[l]);
    const float y = static_cast<float>(body(flush ? flushed(x) : x));
    d[l] = to_bits(flush ? flushed(y) : y);
  });
  return true;
}

// What division by zero and overflow give on a GPU, where C++ gives nothing.
template <class T>
T quotient(T a, T b) {
  if constexpr (kIsFloat<T>) {
    return a / b;
  } else {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - static_cast<uint64_t>(a));
    return static_cast<T>(a / b);
  }
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : static_cast<T>(a % b);
}

bool remainders(Step& step) {
  const uint64_t *a = step.read(1), *b = step.read(2);
  uint64_t* d = step.write();
  return with_integer(step.in.type, [&](auto tag) {
    using T = decltype(tag);
    for_lanes(step.lanes, [&](int l) { d[l] = to_bits<T>(remainder(static_cast<T>(a[l]), static_cast<T>(b[l]))); });
  });
}

// fma of the two 16-bit floats in each register. The exact sum is rounded to float32 first.
bool multiply_pairs(Step& step) {
  const bool bfloat = step.in.type == Type::kBF16x2;
  const auto wide = bfloat ? bfloat_to_float : ssd::float16_to_float;
  const auto narrow = bfloat ? float_to_bfloat : ssd::float_to_float16;
  const uint64_t *a = step.read(1), *b = step.read(2), *c = step.read(3);
  uint64_t* d = step.write();
  for_lanes(step.lanes, [&](int l) {
    const auto half = [&](int at) {
      const auto number = [&](const uint64_t* row) { return double{wide(static_cast<uint16_t>(row[l] >> at))}; };
      return static_cast<uint64_t>(narrow(static_cast<float>(std::fma(number(a), number(b), number(c))))) << at;
    };
    d[l] = half(0) | half(16);
  });
  return true;
}

// mul, mad and fma. Integer products are of twice the width.
bool multiply(Step& step) {
  if (step.in.op == Op::kFma && (step.in.type == Type::kBF16x2 || step.in.type == Type::kF16x2))
    return multiply_pairs(step);
  const uint64_t *a = step.read(1), *b = step.read(2), *c = step.in.op == Op::kMul ? nullptr : step.read(3);
  uint64_t* d = step.write();
  if (step.in.type == Type::kF32 || step.in.type == Type::kF64) {
    return with_type(step.in.type, [&](auto tag) {
      using T = decltype(tag);
      if constexpr (kIsFloat<T>) {
        if (c)
          for_lanes(step.lanes, [&](int l) {
            d[l] = to_bits<T>(std::fma(from_bits<T>(a[l]), from_bits<T>(b[l]), from_bits<T>(c[l])));
          });
        else
          for_lanes(step.lanes, [&](int l) { d[l] = to_bits<T>(from_bits<T>(a[l]) * from_bits<T>(b[l])); });
      }
    });
  }
  const int width = bits_of(step.in.type), shift = step.in.mode == kHigh ? width : 0;
  const uint64_t kept = ones(step.in.mode == kWide ? 2 * width : width);
  return with_integer(step.in.type, [&](auto tag) {
    using T = decltype(tag);
    using Wide = std::conditional_t<sizeof(T) == 8, __int128, int64_t>;
    using Unsigned = std::conditional_t<sizeof(T) == 8, unsigned __int128, uint64_t>;
    for_lanes(step.lanes, [&](int l) {
      const auto x = static_cast<Unsigned>(static_cast<Wide>(static_cast<T>(a[l])));
      const auto y = static_cast<Unsigned>(static_cast<Wide>(static_cast<T>(b[l])));
      d[l] = (static_cast<uint64_t>(x * y >> shift) + (c ? c[l] : 0)) & kept;
    });
  });
}

bool shift(Step& step) {
  const uint64_t *a = step.read(1), *b = step.read(2);
  uint64_t* d = step.write();
  return with_integer(step.in.type, [&](auto tag) {
    using T = decltype(tag);
    constexpr uint32_t kWidth = 8 * sizeof(T);
    const bool left = step.in.op == Op::kShl;
    for_lanes(step.lanes, [&](int l) {
      const uint32_t by = std::min(static_cast<uint32_t>(b[l]), kWidth);
      const T x = static_cast<T>(a[l]);
      const T all_sign = static_cast<T>(x < 0 ? -1 : 0);
      const T shifted = left ? static_cast<T>(static_cast<uint64_t>(x) << (by & 63)) : static_cast<T>(x >> (by & 63));
      d[l] = to_bits<T>(by < kWidth ? shifted : left ? T{0} : all_sign);
    });
  });
}

template <class T>
bool compare(uint8_t how, T x, T y) {
  const bool nan = x != x || y != y;
  switch (how) {
    case kEq:
      return x == y;
    case kNe:
      return x != y && !nan;
    case kLt:
      return x < y;
    case kLe:
      return x <= y;
    case kGt:
      return x > y;
    case kGe:
      return x >= y;
    case kEqu:
      return nan || x == y;
    case kNeu:
      return nan || x != y;
    case kLtu:
      return nan || x < y;
    case kLeu:
      return nan || x <= y;
    case kGtu:
      return nan || x > y;
    case kGeu:
      return nan || x >= y;
    case kNum:
      return !nan;
    default:
      return nan;
  }
}

bool set_predicate(Step& step) {
  const uint64_t *a = step.read(1), *b = step.read(2);
  uint64_t *d = step.write(), *opposite = step.write_row(step.in.second, step.lanes);
  return with_type(step.in.type, [&](auto tag) {
    using T = decltype(tag);
    for_lanes(step.lanes, [&](int l) {
      d[l] = compare(step.in.mode, from_bits<T>(a[l]), from_bits<T>(b[l]));
      opposite[l] = !d[l];
    });
  });
}

// Undefined only where what is selected is.
bool select(Step& step) {
  const uint64_t* p = step.read(3);
  uint32_t first = 0;
  for_lanes(step.lanes, [&](int l) { first |= static_cast<uint32_t>(p[l] & 1) << l; });
  const auto& operands = step.in.operands;
  const uint64_t* a = step.read_row(operands[1].rows[0], first);
  const uint64_t* b = step.read_row(operands[2].rows[0], step.lanes & ~first);
  uint64_t* d = step.write();
  const uint64_t kept = ones(bits_of(step.in.type));
  for_lanes(step.lanes, [&](int l) { d[l] = (p[l] & 1 ? a[l] : b[l]) & kept; });
  return true;
}

}  // namespace

bool compute(Step& step) {
  switch (step.in.op) {
    case Op::kAdd:
      return binary(step, [](auto a, auto b) { return static_cast<decltype(a)>(a + b); });
    case Op::kSub:
      return binary(step, [](auto a, auto b) { return static_cast<decltype(a)>(a - b); });
    case Op::kMul:
    case Op::kMad:
    case Op::kFma:
      return multiply(step);
    case Op::kDiv:
      return binary(step, [](auto a, auto b) { return quotient(a, b); });
    case Op::kRem:
      return remainders(step);
    case Op::kMin:
      return binary(step, [](auto a, auto b) {
        if constexpr (kIsFloat<decltype(a)>)
          return std::fmin(a, b);
        else
          return std::min(a, b);
      });
    case Op::kMax:
      return binary(step, [](auto a, auto b) {
        if constexpr (kIsFloat<decltype(a)>)
          return std::fmax(a, b);
        else
          return std::max(a, b);
      });
    case Op::kNeg:
      return unary(step, [](auto a) { return static_cast<decltype(a)>(-a); });
    case Op::kAbs:
      return unary(step, [](auto a) {
        if constexpr (kIsFloat<decltype(a)>)
          return std::fabs(a);
        else
          return static_cast<decltype(a)>(a < 0 ? -a : a);
      });
    case Op::kShl:
    case Op::kShr:
      return shift(step);
    case Op::kSetPredicate:
      return set_predicate(step);
    case Op::kSelect:
      return select(step);
    case Op::kExp2:
      return function(step, [](double x) { return std::exp2(x); });
    case Op::kLog2:
      return function(step, [](double x) { return std::log2(x); });
    case Op::kReciprocal:
      return function(step, [](float x) { return 1.0f / x; });
    case Op::kSqrt:
      return function(step, [](float x) { return std::sqrt(x); });
    case Op::kRsqrt:
      return function(step, [](double x) { return 1.0 / std::sqrt(x); });
    default:
      return false;
  }
}

}  // namespace ptx
