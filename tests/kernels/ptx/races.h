// Happens-before: which accesses are ordered by barriers, and between blocks by fences around atomics.
#pragma once

#include "context.h"
#include "state.h"

namespace ptx {

class Races {
 public:
  explicit Races(Context& context) : context_(context) {}

  Stamp stamp(const Block& block, int thread, bool strong = false) const;
  void count_write() { ++writes_; }

  // An access to a cell of `what`. `same`: a write that changes nothing. `replicated`: see Launch. False: it read
  // something undefined.
  bool access(History& history, const Stamp& now, const Block& block, bool writes, bool same, bool replicated,
              const std::string& what);

  // All of the block have met.
  static void barrier(Block& block);
  // A fence of a thread, at least of GPU scope.
  static void fence(Block& block, int thread);
  // An atomic of a thread, after a fence if it releases; `acquires`: as if a fence followed.
  void meet(Thread& thread, uint64_t address, bool acquires);

 private:
  bool ordered(const Stamp& before, const Stamp& now, const Block& block) const;

  Context& context_;
  uint32_t writes_ = 1;
  std::unordered_map<uint64_t, View> locations_;  // what atomics have left behind
};

}  // namespace ptx
