// Bits: logic, counting, moving them about, and products of bytes.
#include "step.h"

namespace ptx {
namespace {

template <class F>
bool unary(Step& step, F body) {
  const uint64_t* a = step.read(1);
  uint64_t* d = step.write();
  const uint64_t kept = ones(bits_of(step.in.type));
  for_lanes(step.lanes, [&](int l) { d[l] = body(a[l] & kept) & kept; });
  return true;
}
template <class F>
bool binary(Step& step, F body) {
  const uint64_t *a = step.read(1), *b = step.read(2);
  uint64_t* d = step.write();
  const uint64_t kept = ones(bits_of(step.in.type));
  for_lanes(step.lanes, [&](int l) { d[l] = body(a[l], b[l]) & kept; });
  return true;
}
template <class F>
bool ternary(Step& step, F body) {
  const uint64_t *a = step.read(1), *b = step.read(2), *c = step.read(3);
  uint64_t* d = step.write();
  for_lanes(step.lanes, [&](int l) { d[l] = body(a[l], b[l], c[l]); });
  return true;
}

uint64_t reversed(uint64_t x, int width) {
  uint64_t y = 0;
  for (int i = 0; i < width; ++i) y |= (x >> i & 1) << (width - 1 - i);
  return y;
}

// `count` bits of x from bit `at` on, extended by their sign if the type has one.
uint64_t extracted(uint64_t x, int at, int count, Type type) {
  const int width = bits_of(type);
  const bool negative = is_signed(type) && count && (x >> std::min(at + count - 1, width - 1) & 1);
  uint64_t y = 0;
  for (int i = 0; i < width; ++i) {
    const bool bit = i < count && at + i < width ? x >> (at + i) & 1 : negative;
    y |= static_cast<uint64_t>(bit) << i;
  }
  return y;
}

uint64_t inserted(uint64_t x, uint64_t into, int at, int count, int width) {
  const uint64_t window = at < width ? ones(std::min(count, width - at)) << at : 0;
  return (into & ~window) | (x << (at & 63) & window);
}

uint32_t looked_up(uint64_t a, uint64_t b, uint64_t c, uint64_t table) {
  uint32_t y = 0;
  for (int i = 0; i < 32; ++i)
    y |= static_cast<uint32_t>(table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
  return y;
}

uint32_t permuted(uint64_t low, uint64_t high, uint64_t picks) {
  const uint64_t bytes = high << 32 | static_cast<uint32_t>(low);
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = picks >> (4 * i) & 15, byte = bytes >> (8 * (pick & 7)) & 255;
    const uint32_t sign = byte & 128 ? 255u : 0u;
    y |= (pick & 8 ? sign : byte) << (8 * i);
  }
  return y;
}

// The products of four signed bytes, added to a sum.
uint32_t products(uint64_t a, uint64_t b, uint64_t sum) {
  uint32_t y = static_cast<uint32_t>(sum);
  for (int i = 0; i < 4; ++i) y += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return y;
}

}  // namespace

bool manipulate_bits(Step& step) {
  const Instruction& in = step.in;
  const int width = bits_of(in.type);
  switch (in.op) {
    case Op::kAnd:
      return binary(step, [](uint64_t a, uint64_t b) { return a & b; });
    case Op::kOr:
      return binary(step, [](uint64_t a, uint64_t b) { return a | b; });
    case Op::kXor:
      return binary(step, [](uint64_t a, uint64_t b) { return a ^ b; });
    case Op::kNot:
      return unary(step, [](uint64_t a) { return ~a; });
    case Op::kPopc:
      return unary(step, [](uint64_t a) -> uint64_t { return __builtin_popcountll(a); });
    case Op::kClz:
      return unary(step, [&](uint64_t a) -> uint64_t { return a ? __builtin_clzll(a) - (64 - width) : width; });
    case Op::kBrev:
      return unary(step, [&](uint64_t a) { return reversed(a, width); });
    case Op::kBfind:
      if (is_signed(in.type)) return false;
      return unary(step, [&](uint64_t a) -> uint64_t {
        const int at = a ? 63 - __builtin_clzll(a) : -1;
        return static_cast<uint32_t>(at < 0 ? -1 : in.from_sign ? width - 1 - at : at);
      });
    case Op::kBfe:
      return ternary(step, [&](uint64_t a, uint64_t at, uint64_t count) {
        return extracted(a, static_cast<int>(at & 255), static_cast<int>(count & 255), in.type);
      });
    case Op::kBfi: {
      const uint64_t* count = step.read(4);
      const uint64_t *a = step.read(1), *into = step.read(2), *at = step.read(3);
      uint64_t* d = step.write();
      for_lanes(step.lanes, [&](int l) {
        d[l] = inserted(a[l], into[l], static_cast<int>(at[l] & 255), static_cast<int>(count[l] & 255), width);
      });
      return true;
    }
    case Op::kLop3: {
      const uint64_t table = step.read(4)[0];  // an immediate
      return ternary(step, [&](uint64_t a, uint64_t b, uint64_t c) { return looked_up(a, b, c, table); });
    }
    case Op::kPermute:
      return ternary(step, permuted);
    case Op::kDot:
      return ternary(step, products);
    case Op::kShiftFunnel:
      return ternary(step, [&](uint64_t low, uint64_t high, uint64_t by) -> uint64_t {
        const uint64_t both = high << 32 | static_cast<uint32_t>(low);
        const auto count = in.wraps ? by & 31 : std::min<uint64_t>(static_cast<uint32_t>(by), 32);
        return static_cast<uint32_t>(in.right ? both >> count : both << count >> 32);
      });
    default:
      return false;
  }
}

}  // namespace ptx
