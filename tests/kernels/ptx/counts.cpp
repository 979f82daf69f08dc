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

}  // namespace ptx
