#include "races.h"

namespace ptx {
namespace {

void join(View& view, const View& other) {
  for (const auto& [block, seen] : other) {
    Seen& mine = view[block];
    mine.epoch = std::max(mine.epoch, seen.epoch);
    if (seen.thread != mine.thread || seen.tick > mine.tick) mine.thread = seen.thread, mine.tick = seen.tick;
  }
}

std::string name(const Stamp& stamp) {
  return "thread " + std::to_string(stamp.thread) + " of block " + std::to_string(stamp.block - 1);
}

}  // namespace

Stamp Races::stamp(const Block& block, int thread, bool strong) const {
  Stamp now;
  now.block = block.id + 1;
  now.epoch = block.epoch;
  now.tick = block.threads[thread].tick;
  now.pc = static_cast<uint32_t>(context_.pc);
  now.thread = static_cast<uint16_t>(thread);
  now.warp_epoch = block.warps[thread / kLanes].epoch;
  now.strong = strong;
  now.number = writes_;
  return now;
}

bool Races::ordered(const Stamp& before, const Stamp& now, const Block& block) const {
  if (!before.block) return true;
  if (before.block == now.block)
    return before.thread == now.thread || before.epoch < now.epoch ||
           (before.thread / kLanes == now.thread / kLanes && before.warp_epoch < now.warp_epoch);
  const auto sees = [&](const View& view) {
    const auto it = view.find(before.block);
    return it != view.end() &&
           (before.epoch < it->second.epoch || (before.thread == it->second.thread && before.tick <= it->second.tick));
  };
  return sees(block.seen) || sees(block.threads[now.thread].acquired);
}

bool Races::access(History& history, const Stamp& now, const Block& block, bool writes, bool same, bool replicated,
                   const std::string& what) {
  bool defined = true;
  const auto against = [&](const Stamp& before, const char* kind, bool reading) {
    if (ordered(before, now, block) || (before.strong && now.strong)) return;
    if (reading && replicated && before.block == now.block) {
      defined = writes;
      return;
    }
    const char* where = before.block == now.block ? " race within a block: " : " race between blocks: ";
    context_.report(what + where + kind, static_cast<int>(now.pc), name(before) + " and " + name(now),
                    static_cast<int>(before.pc));
  };
  // Threads that hold copies of a value store it together, which Triton does: no order of those matters.
  const bool together = writes && same && history.write.pc == now.pc && history.write.block == now.block;
  if (!together) against(history.write, writes ? "write after write" : "read after write", !writes);
  if (writes) {
    for (const Stamp& read : history.reads) against(read, "write after read", true);
    // A strong write says nothing of the reads before it: others that are not strong still have to be ordered.
    if (!now.strong) history.reads = {};
    history.write = now;
    return true;
  }
  Stamp& last = history.reads[0];
  if (last.block && !ordered(last, now, block)) history.reads[1] = last;
  last = now;
  return defined;
}

void Races::barrier(Block& block) {
  ++block.epoch;
  for (Thread& thread : block.threads) {
    if (thread.acquired.empty()) continue;
    join(block.seen, thread.acquired);
    thread.acquired.clear();
  }
}

void Races::fence(Block& block, int index) {
  Thread& thread = block.threads[index];
  join(thread.acquired, thread.pending);
  thread.released = block.seen;
  join(thread.released, thread.acquired);
  thread.released[block.id + 1] = {block.epoch, static_cast<uint32_t>(index), thread.tick};
  ++thread.tick;
}

void Races::meet(Thread& thread, uint64_t address, bool acquires) {
  View& location = locations_[address];
  join(location, thread.released);
  join(thread.pending, location);
  if (acquires) join(thread.acquired, thread.pending);
}

}  // namespace ptx
