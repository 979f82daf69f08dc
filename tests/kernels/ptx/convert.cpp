// Moves, and conversions between types.
#include "step.h"

namespace ptx {
namespace {

// Vectors are the parts of one value, the lowest first.
void move(Step& step) {
  const Operand &to = step.in.operands[0], &from = step.in.operands[1];
  const int width = bits_of(step.in.type);
  uint64_t whole[kLanes] = {};
  for (int i = 0; i < from.count; ++i) {
    const uint64_t* a = step.read(1, i);
    const int part = width / from.count;
    for_lanes(step.lanes, [&](int l) { whole[l] |= (a[l] & ones(part)) << (i * part % 64); });
  }
  for (int i = 0; i < to.count; ++i) {
    uint64_t* d = step.write(i);
    const int part = width / to.count;
    for_lanes(step.lanes, [&](int l) { d[l] = whole[l] >> (i * part % 64) & ones(part); });
  }
}

void convert_address(Step& step) {
  const uint64_t* a = step.read(1);
  uint64_t* d = step.write();
  const uint64_t window = step.in.space == Space::kShared ? kSharedWindow : 0;
  const bool to_space = step.in.to_space;
  for_lanes(step.lanes, [&](int l) { d[l] = to_space ? a[l] - window : a[l] + window; });
}

// Two floats into the halves of a register, the first into the upper one.
void pack(Step& step) {
  const uint64_t *upper = step.read(1), *lower = step.read(2);
  uint64_t* d = step.write();
  const auto narrow = step.in.type == Type::kBF16x2 ? float_to_bfloat : ssd::float_to_float16;
  for_lanes(step.lanes, [&](int l) {
    d[l] = static_cast<uint32_t>(narrow(from_bits<float>(upper[l]))) << 16 | narrow(from_bits<float>(lower[l]));
  });
}

// Cut to the type, and extended again to the register.
void convert_integers(Step& step) {
  const uint64_t* a = step.read(1);
  uint64_t* d = step.write();
  const Type to = step.in.type, from = step.in.from;
  const auto cut = [](uint64_t x, Type type) {
    return is_signed(type) ? extend(x, bits_of(type)) : x & ones(bits_of(type));
  };
  const uint64_t kept = ones(std::max(bits_of(to), step.width(step.in.operands[0].rows[0])));
  for_lanes(step.lanes, [&](int l) { d[l] = cut(cut(a[l], from), to) & kept; });
}

bool to_double(uint64_t bits, Type from, double& x) {
  switch (from) {
    case Type::kF16:
      return x = ssd::float16_to_float(static_cast<uint16_t>(bits)), true;
    case Type::kBF16:
      return x = bfloat_to_float(static_cast<uint16_t>(bits)), true;
    default:
      return with_type(from, [&](auto tag) { x = static_cast<double>(from_bits<decltype(tag)>(bits)); }) &&
             bits_of(from) * !is_float(from) < 64;  // integers of 64 bits would be rounded twice
  }
}

double rounded(double x, uint8_t how) {
  switch (how) {
    case kToNearestInteger:
      return std::nearbyint(x);
    case kDownwards:
      return std::floor(x);
    case kUpwards:
      return std::ceil(x);
    default:
      return std::trunc(x);
  }
}

bool from_double(double x, Type to, uint8_t how, uint64_t& bits) {
  const double whole = x != x ? 0.0 : rounded(x, how);
  switch (to) {
    case Type::kF16:
      return bits = ssd::float_to_float16(static_cast<float>(x)), true;
    case Type::kBF16:
      return bits = float_to_bfloat(static_cast<float>(x)), true;
    case Type::kF32:
      return bits = to_bits(static_cast<float>(x)), true;
    case Type::kF64:
      return bits = to_bits(x), true;
    case Type::kS32:
      return bits = to_bits(static_cast<int32_t>(std::max(-2147483648.0, std::min(2147483647.0, whole)))), true;
    case Type::kU32:
      return bits = to_bits(static_cast<uint32_t>(std::max(0.0, std::min(4294967295.0, whole)))), true;
    default:
      return false;
  }
}

bool convert_floats(Step& step) {
  const uint64_t* a = step.read(1);
  uint64_t* d = step.write();
  bool served = true;
  for_lanes(step.lanes, [&](int l) {
    double x = 0.0;
    served &= to_double(a[l], step.in.from, x) && from_double(x, step.in.type, step.in.mode, d[l]);
  });
  return served;
}

}  // namespace

bool convert(Step& step) {
  const Instruction& in = step.in;
  switch (in.op) {
    case Op::kMove:
      return move(step), true;
    case Op::kConvertAddress:
      return convert_address(step), true;
    case Op::kConvert:
      if (in.type == Type::kBF16x2 || in.type == Type::kF16x2) return pack(step), true;
      if (is_float(in.type) || is_float(in.from)) return convert_floats(step);
      return convert_integers(step), true;
    default:
      return false;
  }
}

}  // namespace ptx
