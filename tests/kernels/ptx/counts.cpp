// What one access of a warp costs the memory system.
#include <set>

#include "step.h"

namespace ptx {

void count_global(Context& context, const uint64_t at[kLanes], uint32_t lanes, int bytes) {
  if (!context.options.counts || !lanes) return;
  std::set<uint64_t> sectors, cells;
  for_lanes(lanes, [&](int l) {
    for (uint64_t s = at[l] / 32; s <= (at[l] + bytes - 1) / 32; ++s) sectors.insert(s);
    for (uint64_t c = at[l] / kCellBytes; c < (at[l] + bytes) / kCellBytes; ++c) cells.insert(c);
  });
  Count& count = context.count();
  count.sectors += sectors.size();
  count.best_sectors += (cells.size() * kCellBytes + 31) / 32;
  count.bytes += cells.size() * kCellBytes;
}

// Lanes that access 8 or 16 bytes go half or a quarter of a warp at a time; different words of one of the 32 banks wait
// for each other.
void count_shared(Context& context, const uint64_t at[kLanes], uint32_t lanes, int bytes) {
  if (!context.options.counts || !lanes) return;
  Count& count = context.count();
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += together) {
    std::set<uint64_t> words[32];
    size_t most = 0;
    for (int l = first; l < first + together; ++l) {
      if (!(lanes >> l & 1)) continue;
      for (uint64_t word = at[l] / 4; word <= (at[l] + bytes - 1) / 4; ++word) {
        words[word % 32].insert(word);
        most = std::max(most, words[word % 32].size());
      }
    }
    count.wavefronts += most;
    count.best_wavefronts += most > 0;
  }
  count.bytes += static_cast<uint64_t>(bytes) * __builtin_popcount(lanes);
}

void count_issue(Context& context, Warp& warp, const Instruction& in) {
  const bool is_load = in.op == Op::kLoad && in.space == Space::kGlobal;
  const bool gives_nothing = in.op == Op::kAtomic && !in.returns;
  const bool all_read = in.op == Op::kStore || in.op == Op::kCopy || in.op == Op::kBranch || gives_nothing;
  const auto wait = [&](int row) {
    if (row != kNoRow) warp.waits = std::max(warp.waits, warp.filled_by[row]);
  };
  wait(in.guard);
  for (int i = all_read ? 0 : 1; i < in.count; ++i)
    for (const int row : in.operands[i].rows) wait(row);
  const bool fills = is_load || (in.op == Op::kAtomic && in.returns);
  if (!all_read && in.count)
    for (const int row : in.operands[0].rows)
      if (row != kNoRow) warp.filled_by[row] = fills ? warp.waits + 1 : 0;
  const bool is_wide = in.op == Op::kCopy && context.function.opcodes[context.pc].rfind("cp.async.cg", 0) == 0;
  if (is_wide && !warp.copies) {
    FirstCopy& first = context.first_copy;
    ++first.warps, first.instructions += warp.instructions, first.waits += warp.waits;
    warp.copies = true;
  }
  ++warp.instructions;
}

void count_barrier(Block& block) {
  uint32_t waits = 0;
  for (const Warp& warp : block.warps) waits = std::max(waits, warp.waits);
  for (Warp& warp : block.warps) warp.waits = waits;
}

}  // namespace ptx
