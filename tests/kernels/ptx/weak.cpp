#include "weak.h"

namespace ptx {

void WeakMemory::fill(Block& block, uint64_t sector) {
  const auto [it, fresh] = block.cached.try_emplace(sector);
  if (fresh) std::memcpy(it->second.data(), reinterpret_cast<const void*>(sector), 32);
}

// A block sees its own stores.
void WeakMemory::overlay(const Block& block, uint64_t at, int bytes, void* to) const {
  if (block.delayed.empty()) return;
  for (uint64_t word = at & ~uint64_t{3}; word < at + bytes; word += 4) {
    const auto it = block.delayed.find(word);
    if (it == block.delayed.end()) continue;
    for (int i = 0; i < 4; ++i)
      if (it->second.mask >> i & 1 && word + i >= at && word + i < at + bytes)
        static_cast<uint8_t*>(to)[word + i - at] = it->second.data[i];
  }
}

void WeakMemory::write(Block& block, int thread, uint64_t at, int bytes, const void* from) {
  if (!context_.options.weak) {
    std::memcpy(reinterpret_cast<void*>(at), from, bytes);
    return;
  }
  for (int i = 0; i < bytes; ++i) {
    Delayed& word = block.delayed[(at + i) & ~uint64_t{3}];
    word.data[(at + i) & 3] = static_cast<const uint8_t*>(from)[i];
    word.mask |= static_cast<uint8_t>(1 << ((at + i) & 3));
    word.thread = static_cast<uint16_t>(thread);
    word.epoch = block.epoch;
  }
}

void WeakMemory::perform(Block& block, uint64_t at, const Delayed& word) {
  const auto sector = block.cached.find(at & ~uint64_t{31});
  for (int i = 0; i < 4; ++i) {
    if (!(word.mask >> i & 1)) continue;
    *reinterpret_cast<uint8_t*>(at + i) = word.data[i];
    if (sector != block.cached.end()) sector->second[(at & 31) + i] = word.data[i];
  }
}

// The thread's own stores, and all that the block's barriers have ordered before.
void WeakMemory::fence(Block& block, int thread) {
  block.cached.clear();
  for (auto it = block.delayed.begin(); it != block.delayed.end();) {
    if (it->second.thread != thread && it->second.epoch >= block.epoch) {
      ++it;
      continue;
    }
    perform(block, it->first, it->second);
    it = block.delayed.erase(it);
  }
}

void WeakMemory::flush(Block& block) {
  for (const auto& [at, word] : block.delayed) perform(block, at, word);
  block.delayed.clear();
}

void WeakMemory::arrive_one(Block& block) {
  if (block.delayed.empty()) return;
  const auto it = block.delayed.begin();
  perform(block, it->first, it->second);
  block.delayed.erase(it);
}

void WeakMemory::arrive(Block& block, uint64_t at, int bytes) {
  for (uint64_t word = at & ~uint64_t{3}; word < at + bytes; word += 4) {
    const auto it = block.delayed.find(word);
    if (it == block.delayed.end()) continue;
    perform(block, word, it->second);
    block.delayed.erase(it);
  }
}

}  // namespace ptx
