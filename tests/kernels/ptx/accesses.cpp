// Loads, stores, atomics and asynchronous copies.
#include "step.h"

namespace ptx {
namespace {

struct Addresses {
  uint64_t of[kLanes];
};

Addresses addresses(Step& step, int operand, Space space) {
  const uint64_t* base = step.read(operand);
  step.require_defined("an address");
  const int64_t offset = step.in.operands[operand].offset;
  Addresses at;
  for_lanes(step.lanes, [&](int l) {
    at.of[l] = base[l] + offset;
    if (space == Space::kShared) at.of[l] = static_cast<uint32_t>(at.of[l]);
  });
  return at;
}

bool is_shared(Space space, uint64_t at) {
  return space == Space::kShared || (space == Space::kGeneric && at >= kSharedWindow);
}

void count(Step& step, const Addresses& at, int bytes) {
  if (step.in.space == Space::kShared) count_shared(step.context, at.of, step.lanes, bytes);
  if (step.in.space == Space::kGlobal) count_global(step.context, at.of, step.lanes, bytes);
}

// Returns whether what was loaded is defined.
bool load_lane(Step& step, int lane, uint64_t at, int bytes, uint8_t* data) {
  const int thread = step.warp.thread(lane);
  if (step.in.space == Space::kParam) {
    const auto& params = step.context.launch.params;
    if (at + bytes <= params.size() && at % bytes == 0) {
      std::memcpy(data, &params[at], bytes);
    } else {
      step.context.report("out of bounds or misaligned in the parameters");
      std::memset(data, 0xFF, bytes);
    }
    return true;
  }
  if (is_shared(step.in.space, at)) return step.memory.load_shared(step.block, thread, at % kSharedWindow, bytes, data);
  return step.memory.load_global(step.block, {thread, step.in.strong, step.in.cached}, at, bytes, data);
}

void load(Step& step) {
  const Instruction& in = step.in;
  const int size = bytes_of(in.type), bytes = size * in.vector;
  const Addresses at = addresses(step, 1, in.space);
  count(step, at, bytes);
  uint64_t* d[4];
  int width[4];
  for (int i = 0; i < in.vector; ++i) d[i] = step.write(i), width[i] = step.width(in.operands[0].rows[i]);
  uint32_t undefined = 0;
  const bool extends = is_signed(in.type);
  for_lanes(step.lanes, [&](int l) {
    uint8_t data[16];
    undefined |= static_cast<uint32_t>(!load_lane(step, l, at.of[l], bytes, data)) << l;
    for (int i = 0; i < in.vector; ++i) {
      uint64_t x = 0;
      std::memcpy(&x, data + i * size, size);
      d[i][l] = extends ? extend(x, 8 * size) & ones(width[i]) : x;
    }
  });
  if (undefined)
    for (int i = 0; i < in.vector; ++i) step.mark_undefined(i, undefined);
}

void store(Step& step) {
  const Instruction& in = step.in;
  const int size = bytes_of(in.type), bytes = size * in.vector;
  const Addresses at = addresses(step, 0, in.space);
  count(step, at, bytes);
  const uint64_t* a[4];
  for (int i = 0; i < in.vector; ++i) a[i] = step.read(1, i);
  const uint32_t undefined = step.undefined;
  if (in.space != Space::kShared) step.require_defined("stored in global memory");
  for_lanes(step.lanes, [&](int l) {
    uint8_t data[16];
    for (int i = 0; i < in.vector; ++i) std::memcpy(data + i * size, &a[i][l], size);
    const int thread = step.warp.thread(l);
    if (is_shared(in.space, at.of[l]))
      step.memory.store_shared(step.block, thread, at.of[l] % kSharedWindow, bytes, data, !(undefined >> l & 1));
    else
      step.memory.store_global(step.block, {thread, in.strong, false}, at.of[l], bytes, data);
  });
}

uint64_t updated(const Instruction& in, uint64_t old, uint64_t value, uint64_t other) {
  if (in.mode == kSwap) return value;
  if (in.mode == kCompareAndSwap) return old == value ? other : old;
  if (in.mode == kIncrement) return old >= value ? 0 : old + 1;
  if (in.type == Type::kF32) return to_bits(from_bits<float>(old) + from_bits<float>(value));
  const bool narrow = bytes_of(in.type) == 4 && is_signed(in.type);
  const auto x = static_cast<int64_t>(narrow ? extend(old, 32) : old);
  const auto y = static_cast<int64_t>(narrow ? extend(value, 32) : value);
  return reduced(in.mode, x, y);
}

void update(Step& step) {
  const Instruction& in = step.in;
  const int first = in.returns ? 1 : 0, size = bytes_of(in.type);
  if (in.space != Space::kGlobal || (is_float(in.type) && (in.type != Type::kF32 || in.mode != kSum)))
    step.context.refuse();
  const Addresses at = addresses(step, first, in.space);
  count_global(step.context, at.of, step.lanes, size);
  uint64_t values[kLanes], others[kLanes] = {};
  std::memcpy(values, step.read(first + 1), sizeof values);
  if (in.mode == kCompareAndSwap) std::memcpy(others, step.read(first + 2), sizeof others);
  step.require_defined("an atomic's operand");
  uint64_t* d = step.write_row(in.returns ? in.operands[0].rows[0] : kNoRow, step.lanes);
  for_lanes(step.lanes, [&](int l) {
    const uint64_t old =
        step.memory.update_global(step.block, step.warp.thread(l), at.of[l], size, in.release, in.acquire,
                                  [&](uint64_t before) { return updated(in, before, values[l], others[l]); });
    d[l] = old & ones(8 * size);
  });
}

void copy(Step& step) {
  const Addresses to = addresses(step, 0, Space::kShared), from = addresses(step, 1, Space::kGlobal);
  const auto bytes = static_cast<int>(step.read(2)[__builtin_ctz(step.lanes)]);  // an immediate
  const uint64_t* wanted = step.in.count > 3 ? step.read(3) : nullptr;
  step.require_defined("a copy's size");
  uint32_t reading = 0;
  for_lanes(step.lanes, [&](int l) {
    const int read = wanted ? std::min(static_cast<int>(wanted[l]), bytes) : bytes;
    reading |= static_cast<uint32_t>(read > 0) << l;
    const int thread = step.warp.thread(l);
    step.memory.start_copy(step.block, thread,
                           {static_cast<uint32_t>(to.of[l]), from.of[l], bytes, read, step.block.threads[thread].groups,
                            step.context.pc, 0, false});
  });
  count_shared(step.context, to.of, step.lanes, bytes);
  count_global(step.context, from.of, reading, bytes);
}

}  // namespace

uint64_t reduced(uint8_t how, int64_t a, int64_t b) {
  switch (how) {
    case kSum:
      return static_cast<uint64_t>(a) + static_cast<uint64_t>(b);
    case kMinimum:
      return static_cast<uint64_t>(std::min(a, b));
    case kMaximum:
      return static_cast<uint64_t>(std::max(a, b));
    case kBitAnd:
      return static_cast<uint64_t>(a & b);
    case kBitOr:
      return static_cast<uint64_t>(a | b);
    default:
      return static_cast<uint64_t>(a ^ b);
  }
}

bool access_memory(Step& step) {
  switch (step.in.op) {
    case Op::kLoad:
      if (step.in.space == Space::kLocal || step.in.space == Space::kConst) return false;
      return load(step), true;
    case Op::kStore:
      if (step.in.space == Space::kLocal || step.in.space == Space::kParam) return false;
      return store(step), true;
    case Op::kAtomic:
      return update(step), true;
    case Op::kFence:
      if (!step.in.of_block) for_lanes(step.lanes, [&](int l) { step.memory.fence(step.block, step.warp.thread(l)); });
      return true;
    case Op::kCopy:
      return copy(step), true;
    case Op::kCommitCopies:
      for_lanes(step.lanes, [&](int l) { ++step.block.threads[step.warp.thread(l)].groups; });
      return true;
    case Op::kWaitCopies:
    case Op::kWaitAllCopies: {
      const int left = step.in.op == Op::kWaitCopies ? static_cast<int>(step.read(0)[__builtin_ctz(step.lanes)]) : -1;
      for_lanes(step.lanes, [&](int l) { step.memory.wait_copies(step.block, step.warp.thread(l), left); });
      return true;
    }
    default:
      return false;
  }
}

}  // namespace ptx
