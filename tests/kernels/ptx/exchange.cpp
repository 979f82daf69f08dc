// Shuffles, votes and reductions: every lane of the mask gives a value.
#include "step.h"

namespace ptx {
namespace {

void vote(Step& step) {
  const uint64_t* p = step.read(1);
  step.require_defined("voted with");
  uint32_t votes = 0;
  for_lanes(step.lanes, [&](int l) { votes |= static_cast<uint32_t>(p[l] & 1) << l; });
  const bool all = votes == step.lanes, any = votes != 0;
  const uint8_t how = step.in.mode;
  const uint64_t result = how == kBallotAll ? votes : how == kAny ? any : how == kAll ? all : all || !any;
  uint64_t* d = step.write();
  for_lanes(step.lanes, [&](int l) { d[l] = result; });
}

void reduce(Step& step) {
  const uint64_t* a = step.read(1);
  if (step.undefined) step.undefined = step.lanes;
  const auto value = [&](int l) {
    return is_signed(step.in.type) ? static_cast<int64_t>(extend(a[l], 32)) : static_cast<int64_t>(a[l] & ones(32));
  };
  int64_t result = value(__builtin_ctz(step.lanes));
  const uint32_t others = step.lanes & (step.lanes - 1);
  for_lanes(others, [&](int l) { result = static_cast<int64_t>(reduced(step.in.mode, result, value(l))); });
  uint64_t* d = step.write();
  for_lanes(step.lanes, [&](int l) { d[l] = static_cast<uint32_t>(result); });
}

struct Source {
  int lane;
  bool valid;  // else the lane's own value
};

Source source(uint8_t how, int lane, int by, uint64_t limits) {
  const int clamp = limits & 31, segment = limits >> 8 & 31;
  const int lowest = lane & segment, highest = lowest | (clamp & ~segment);
  int from = 0;
  switch (how) {
    case kIndexed:
      from = lowest | (by & ~segment);
      break;
    case kUp:
      from = lane - by;
      return {from >= highest ? from : lane, from >= highest};
    case kDown:
      from = lane + by;
      break;
    default:
      from = lane ^ by;
  }
  return {from <= highest ? from : lane, from <= highest};
}

void shuffle(Step& step) {
  uint64_t by[kLanes], limits[kLanes], given[kLanes];
  std::memcpy(by, step.read(2), sizeof by);
  std::memcpy(limits, step.read(3), sizeof limits);
  step.require_defined("a shuffle's source");
  std::memcpy(given, step.read(1), sizeof given);
  const uint32_t source_undefined = step.undefined;
  step.undefined = 0;
  uint64_t *d = step.write(), *valid = step.write_row(step.in.second, step.lanes);
  uint32_t undefined = 0;
  for_lanes(step.lanes, [&](int l) {
    const Source from = source(step.in.mode, l, static_cast<int>(by[l] & 31), limits[l]);
    if (!(step.lanes >> from.lane & 1)) step.context.report("a shuffle reads a lane that does not take part");
    undefined |= (source_undefined >> from.lane & 1) << l;
    d[l] = static_cast<uint32_t>(given[from.lane]);
    valid[l] = from.valid;
  });
  step.mark_undefined(0, undefined);
}

}  // namespace

void exchange(Step& step) {
  switch (step.in.op) {
    case Op::kWarpBarrier:
      ++step.warp.epoch;
      return;
    case Op::kVote:
      return vote(step);
    case Op::kReduce:
      return reduce(step);
    case Op::kShuffle:
      return shuffle(step);
    case Op::kMma:
      return multiply_matrices(step);
    default:
      return move_matrices(step);
  }
}

}  // namespace ptx
