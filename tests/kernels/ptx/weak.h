// What the memory model lets other blocks see, and when: plain stores arrive late, plain loads may be stale.
#pragma once

#include <cstring>

#include "context.h"
#include "state.h"

namespace ptx {

class WeakMemory {
 public:
  explicit WeakMemory(Context& context) : context_(context) {}

  // `cached`: the first-level cache may serve it. `exists`: whether a sector at an address can be fetched.
  template <class F>
  void read(Block& block, uint64_t at, int bytes, void* to, bool cached, F exists);
  void write(Block& block, int thread, uint64_t at, int bytes, const void* from);

  void fence(Block& block, int thread);               // what must be seen by now
  void flush(Block& block);                           // everything
  void arrive_one(Block& block);                      // one store, by itself
  void arrive(Block& block, uint64_t at, int bytes);  // those to an address

 private:
  void fill(Block& block, uint64_t sector);
  void overlay(const Block& block, uint64_t at, int bytes, void* to) const;
  void perform(Block& block, uint64_t at, const Delayed& word);

  Context& context_;
};

template <class F>
void WeakMemory::read(Block& block, uint64_t at, int bytes, void* to, bool cached, F exists) {
  std::memcpy(to, reinterpret_cast<const void*>(at), bytes);
  if (!context_.options.weak) return;
  if (cached) {
    const uint64_t sector = at & ~uint64_t{31};
    if (!block.cached.count(sector) && context_.draw(4))
      for (uint64_t other = at & ~uint64_t{127}, end = other + 128; other < end; other += 32)
        if ((other == sector || context_.draw(2)) && exists(other, 32)) fill(block, other);
    if (const auto it = block.cached.find(sector); it != block.cached.end())
      std::memcpy(to, it->second.data() + (at - sector), bytes);
  }
  overlay(block, at, bytes, to);
}

}  // namespace ptx
