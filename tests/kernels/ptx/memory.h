// Global and shared memory: every access is checked before it happens.
#pragma once

#include <memory>

#include "races.h"
#include "weak.h"

namespace ptx {

class Memory {
 public:
  Memory(Context& context, std::vector<Buffer> buffers);

  // How a thread accesses global memory.
  struct Access {
    int thread;
    bool strong, cached;
  };

  // Loads return whether all that was read is defined; stores are told.
  bool load_shared(Block& block, int thread, uint64_t at, int bytes, void* to);
  void store_shared(Block& block, int thread, uint64_t at, int bytes, const void* from, bool defined);
  bool load_global(Block& block, const Access& access, uint64_t at, int bytes, void* to);
  void store_global(Block& block, const Access& access, uint64_t at, int bytes, const void* from);

  // Replaces the value at an address by what `update` makes of it, in one go; returns the old one.
  template <class F>
  uint64_t update_global(Block& block, int thread, uint64_t at, int bytes, bool releases, bool acquires, F update);

  void fence(Block& block, int thread);
  void flush(Block& block) { weak_.flush(block); }
  void arrive_one(Block& block) { weak_.arrive_one(block); }

  // Asynchronous copies: their target belongs to nobody from their start until the thread that copies has waited.
  void start_copy(Block& block, int thread, const Copy& copy);
  void arrive_some(Block& block);
  // Groups that may stay under way; less than 0 awaits copies without a group, too.
  void wait_copies(Block& block, int thread, int left);

 private:
  struct FreeCalloc {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Watched : Buffer {
    std::unique_ptr<History, FreeCalloc> histories;  // by cell; null: races are not watched. Zero pages cost nothing
    std::vector<uint8_t> written;                    // by cell; empty: all is defined
  };

  Watched* find(uint64_t at, int bytes);
  Watched* check_global(uint64_t at, int bytes, bool writes);
  // False: what is read there is undefined.
  bool watch_global(Watched& buffer, const Block& block, const Access& access, uint64_t at, int bytes, bool writes,
                    const void* from);
  bool check_shared(const Block& block, uint64_t at, int bytes);
  void watch_shared(Block& block, int thread, uint64_t at, int bytes, bool writes, const void* from);
  void fetch(Block& block, uint64_t at, int bytes, void* to, bool cached) {
    weak_.read(block, at, bytes, to, cached, [this](uint64_t other, int size) { return find(other, size) != nullptr; });
  }
  void arrive(Block& block, Copy& copy);
  void finish(Block& block, int thread, Copy& copy);

  Context& context_;
  Races races_;
  WeakMemory weak_;
  std::vector<Watched> buffers_;  // by address
  size_t last_ = 0;
};

template <class F>
uint64_t Memory::update_global(Block& block, int thread, uint64_t at, int bytes, bool releases, bool acquires,
                               F update) {
  races_.count_write();
  Watched* buffer = check_global(at, bytes, true);
  if (!buffer) return 0;
  for (const bool writes : {false, true})
    watch_global(*buffer, block, {thread, true, false}, at, bytes, writes, nullptr);
  if (releases) fence(block, thread);
  weak_.arrive(block, at, bytes);
  uint64_t old = 0;
  std::memcpy(&old, reinterpret_cast<const void*>(at), bytes);
  const uint64_t fresh = update(old);
  std::memcpy(reinterpret_cast<void*>(at), &fresh, bytes);
  races_.meet(block.threads[thread], at, acquires);
  if (acquires) block.cached.clear();
  return old;
}

}  // namespace ptx
