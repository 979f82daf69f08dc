#include "memory.h"

#include <algorithm>
#include <cstdlib>

namespace ptx {
namespace {

constexpr uint64_t kNear = 4096;  // bytes beside a buffer within which its name is worth telling

uint64_t cell_of(uint64_t offset) { return offset / kCellBytes; }
uint64_t cells_until(uint64_t offset) { return (offset + kCellBytes - 1) / kCellBytes; }

}  // namespace

Memory::Memory(Context& context, std::vector<Buffer> buffers) : context_(context), races_(context), weak_(context) {
  std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.base < b.base; });
  for (Buffer& buffer : buffers) {
    Watched watched{std::move(buffer), nullptr, {}};
    const uint64_t cells = cells_until(watched.bytes);
    if (context.options.races) watched.histories.reset(static_cast<History*>(std::calloc(cells, sizeof(History))));
    if (!watched.defined) watched.written.resize(cells);
    buffers_.push_back(std::move(watched));
  }
}

Memory::Watched* Memory::find(uint64_t at, int bytes) {
  const auto holds = [&](const Watched& buffer) {
    return at >= buffer.base && at + bytes <= buffer.base + buffer.bytes;
  };
  if (last_ < buffers_.size() && holds(buffers_[last_])) return &buffers_[last_];
  const auto after = std::upper_bound(buffers_.begin(), buffers_.end(), at,
                                      [](uint64_t address, const Watched& buffer) { return address < buffer.base; });
  if (after == buffers_.begin() || !holds(*(after - 1))) return nullptr;
  last_ = after - 1 - buffers_.begin();
  return &buffers_[last_];
}

Memory::Watched* Memory::check_global(uint64_t at, int bytes, bool writes) {
  Watched* buffer = find(at, bytes);
  if (!buffer) {
    std::string near = "nowhere near a buffer";
    for (const Watched& b : buffers_)
      if (at + kNear > b.base && at < b.base + b.bytes + kNear)
        near =
            b.name + ", byte " + std::to_string(static_cast<int64_t>(at - b.base)) + " of " + std::to_string(b.bytes);
    context_.report("out of bounds in global memory", near);
    return nullptr;
  }
  if (at % bytes) {
    context_.report("misaligned in global memory", buffer->name);
    return nullptr;
  }
  if (writes && !buffer->writable) context_.report("writes a buffer that is only read", buffer->name);
  return buffer;
}

bool Memory::watch_global(Watched& buffer, const Block& block, const Access& access, uint64_t at, int bytes,
                          bool writes, const void* from) {
  const uint64_t first = cell_of(at - buffer.base), end = cells_until(at - buffer.base + bytes);
  bool defined = true;
  for (uint64_t cell = first; !buffer.defined && cell < end; ++cell) {
    if (writes) buffer.written[cell] = 1;
    defined &= buffer.written[cell] != 0;
  }
  if (!buffer.histories) return defined;
  const Stamp now = races_.stamp(block, access.thread, access.strong);
  const bool same = from && !std::memcmp(reinterpret_cast<const void*>(at), from, bytes);
  for (uint64_t cell = first; cell < end; ++cell)
    defined &=
        races_.access(buffer.histories.get()[cell], now, block, writes, same, context_.launch.replicated, buffer.name);
  return defined;
}

bool Memory::load_global(Block& block, const Access& access, uint64_t at, int bytes, void* to) {
  Watched* buffer = check_global(at, bytes, false);
  if (!buffer) {
    std::memset(to, 0xFF, bytes);
    return true;  // reported already
  }
  fetch(block, at, bytes, to, access.cached);
  return watch_global(*buffer, block, access, at, bytes, false, nullptr);
}

void Memory::store_global(Block& block, const Access& access, uint64_t at, int bytes, const void* from) {
  races_.count_write();
  Watched* buffer = check_global(at, bytes, true);
  if (!buffer) return;
  watch_global(*buffer, block, access, at, bytes, true, from);
  weak_.write(block, access.thread, at, bytes, from);
}

void Memory::fence(Block& block, int thread) {
  Races::fence(block, thread);
  weak_.fence(block, thread);
}

bool Memory::check_shared(const Block& block, uint64_t at, int bytes) {
  if (at + bytes > block.shared.size()) {
    context_.report("out of bounds in shared memory",
                    "byte " + std::to_string(at) + " of " + std::to_string(block.shared.size()));
    return false;
  }
  if (at % bytes) context_.report("misaligned in shared memory", "byte " + std::to_string(at));
  return true;
}

void Memory::watch_shared(Block& block, int thread, uint64_t at, int bytes, bool writes, const void* from) {
  for (uint64_t cell = cell_of(at); cell < cells_until(at + bytes); ++cell)
    if (block.copies[cell]) context_.report("accesses shared memory while a copy to it is under way");
  if (block.histories.empty()) return;
  const Stamp now = races_.stamp(block, thread);
  const bool same = from && !std::memcmp(&block.shared[at], from, bytes);
  for (uint64_t cell = cell_of(at); cell < cells_until(at + bytes); ++cell)
    races_.access(block.histories[cell], now, block, writes, same, false, "shared memory");
}

bool Memory::load_shared(Block& block, int thread, uint64_t at, int bytes, void* to) {
  if (!check_shared(block, at, bytes)) {
    std::memset(to, 0xFF, bytes);
    return true;
  }
  watch_shared(block, thread, at, bytes, false, nullptr);
  std::memcpy(to, &block.shared[at], bytes);
  return std::all_of(block.defined.begin() + cell_of(at), block.defined.begin() + cells_until(at + bytes),
                     [](uint8_t defined) { return defined != 0; });
}

void Memory::store_shared(Block& block, int thread, uint64_t at, int bytes, const void* from, bool defined) {
  if (!check_shared(block, at, bytes)) return;
  watch_shared(block, thread, at, bytes, true, from);
  std::memcpy(&block.shared[at], from, bytes);
  std::fill(block.defined.begin() + cell_of(at), block.defined.begin() + cells_until(at + bytes), defined);
}

void Memory::start_copy(Block& block, int thread, const Copy& copy) {
  if (!check_shared(block, copy.to, copy.bytes)) return;
  if (copy.from % copy.bytes) context_.report("misaligned in global memory", "the source of a copy");
  if (copy.read) {
    Watched* buffer = check_global(copy.from, copy.read, false);
    if (!buffer) return;
    watch_global(*buffer, block, {thread, false, false}, copy.from, copy.read, false, nullptr);
  }
  watch_shared(block, thread, copy.to, copy.bytes, true, nullptr);
  for (uint64_t cell = cell_of(copy.to); cell < cells_until(copy.to + copy.bytes); ++cell) ++block.copies[cell];
  block.threads[thread].copies.push_back(copy);
  block.threads[thread].copies.back().number = races_.stamp(block, thread).number;
  if (context_.options.copies == Copies::kAtOnce) arrive(block, block.threads[thread].copies.back());
}

void Memory::arrive(Block& block, Copy& copy) {
  if (copy.arrived) return;
  copy.arrived = true;
  std::memset(&block.shared[copy.to], 0, copy.bytes);
  if (copy.read) fetch(block, copy.from, copy.read, &block.shared[copy.to], false);
}

void Memory::arrive_some(Block& block) {
  for (int attempt = 0; attempt < 4; ++attempt) {
    std::vector<Copy>& copies = block.threads[context_.draw(block.threads.size())].copies;
    if (copies.empty()) continue;
    for (size_t n = context_.draw(copies.size()) + 1; n > 0; --n) arrive(block, copies[context_.draw(copies.size())]);
  }
}

void Memory::finish(Block& block, int thread, Copy& copy) {
  arrive(block, copy);
  const Stamp now = races_.stamp(block, thread);
  for (uint64_t cell = cell_of(copy.to); cell < cells_until(copy.to + copy.bytes); ++cell) {
    --block.copies[cell];
    block.defined[cell] = 1;
    if (!block.histories.empty()) block.histories[cell].write = now;
  }
  if (!copy.read) return;
  const Watched& buffer = *find(copy.from, copy.read);
  if (!buffer.histories) return;
  const uint64_t offset = copy.from - buffer.base;
  for (uint64_t cell = cell_of(offset); cell < cells_until(offset + copy.read); ++cell)
    if (const Stamp& write = buffer.histories.get()[cell].write; write.block && write.number > copy.number)
      context_.report("the source of a copy is written while it is under way", static_cast<int>(write.pc), buffer.name,
                      copy.pc);
}

void Memory::wait_copies(Block& block, int index, int left) {
  Thread& thread = block.threads[index];
  const auto awaited = [&](const Copy& copy) { return left < 0 || copy.group < thread.groups - left; };
  for (Copy& copy : thread.copies)
    if (awaited(copy)) finish(block, index, copy);
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), awaited), thread.copies.end());
}

}  // namespace ptx
