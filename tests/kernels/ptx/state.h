// Threads, warps and blocks, and what is remembered of memory.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;
constexpr int kCellBytes = 1;  // finest memory that is watched: coarser cells give false races between neighbours

// Who accessed a cell, and when: epochs count the block's or warp's barriers, ticks the thread's fences.
struct Stamp {
  uint32_t block = 0;  // + 1; 0: nobody
  uint32_t epoch = 0, tick = 0, pc = 0;
  uint16_t thread = 0, warp_epoch = 0;
  bool strong = false;
  uint32_t number = 0;  // counts the launch's writes
};

// The last write of a cell, and the last reads that nothing orders.
struct History {
  Stamp write;
  std::array<Stamp, 2> reads;
};

// What of another block a thread has been made to see: epochs before this one, and one thread's accesses up to a tick.
struct Seen {
  uint32_t epoch = 0, thread = 0, tick = 0;
};
using View = std::map<uint32_t, Seen>;  // by Stamp::block

struct Copy {
  uint32_t to;
  uint64_t from;
  int bytes, read, group, pc;  // beyond `read` bytes, zeros
  uint32_t number;             // of the launch's writes when it began
  bool arrived;
};

struct Thread {
  std::vector<Copy> copies;  // under way
  int groups = 0;            // committed
  uint32_t tick = 1;
  View acquired, pending, released;  // pending: seen by an atomic, but not by a fence after it
};

struct Warp {
  int index;
  std::vector<uint64_t> values;   // [rows][lanes]
  std::vector<uint32_t> defined;  // [rows], a bit per lane
  std::array<uint32_t, kLanes> pc{};
  uint32_t live = 0, waiting = 0, barred = 0;  // waiting for lanes of the warp, or at the block's barrier
  uint16_t epoch = 0;
  // For counts: instructions, waits for global memory one after the other, which of these fills a row, and whether a
  // copy has begun.
  uint64_t instructions = 0;
  uint32_t waits = 0;
  std::vector<uint32_t> filled_by;  // [rows]
  bool copies = false;

  uint32_t runnable() const { return live & ~waiting & ~barred; }
  int thread(int lane) const { return index * kLanes + lane; }
};

// Four bytes that other blocks do not see yet.
struct Delayed {
  std::array<uint8_t, 4> data;
  uint8_t mask = 0;
  uint16_t thread;
  uint32_t epoch;
};

struct Block {
  uint32_t id;
  uint32_t epoch = 0;
  int live = 0, barred = 0;
  std::vector<uint8_t> shared;
  std::vector<uint8_t> defined;    // by cell of shared memory
  std::vector<uint16_t> copies;    // under way to each cell
  std::vector<History> histories;  // by cell, if races are watched
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  View seen;
  std::unordered_map<uint64_t, Delayed> delayed;                 // by address
  std::unordered_map<uint64_t, std::array<uint8_t, 32>> cached;  // first-level cache: sectors by address
};

template <class F>
void for_lanes(uint32_t mask, F body) {
  if (mask == kAllLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) body(lane);
  } else {
    for (; mask; mask &= mask - 1) body(__builtin_ctz(mask));
  }
}

}  // namespace ptx
