// The (row, head) items of a decode step: where each one's kept set lies, and touching it ahead of its use.
#pragma once

#include <cstdint>

#include "common/layer.h"
#include "cpu/simd.h"

namespace ssd {
namespace {

constexpr int64_t kLine = 64;

// An item's place: which row and head, and where its kept set lies.
struct Item {
  int32_t row;
  int32_t head;
  HeadRange range;
  RowView view;
  Segment segments[3];
  int32_t num_segments;
};

SSD_INLINE Item item_at(const CacheLayer& layer, bool row_by_row, int64_t index) {
  Item item;
  if (row_by_row) {
    item.row = static_cast<int32_t>(index / layer.shape.heads);
    item.head = static_cast<int32_t>(index % layer.shape.heads);
  } else {
    item.row = static_cast<int32_t>(index % layer.shape.batch);
    item.head = layer.heads[index / layer.shape.batch].launch_order;
  }
  item.range = layer.heads[item.head];
  item.view = row_view(layer.shape, item.range, layer.cursors[item.row]);
  item.num_segments = live_segments(item.range, item.view, item.segments);
  return item;
}

template <class T>
SSD_INLINE T* first_slot(void* slab, const CacheLayer& layer, const Item& item) {
  const int64_t slot = static_cast<int64_t>(item.row) * layer.shape.slots + item.range.offset;
  return static_cast<T*>(slab) + slot * layer.shape.head_dim;
}

SSD_INLINE float* item_scores(const CacheLayer& layer, const Item& item) {
  return layer.scores + static_cast<int64_t>(item.row) * layer.shape.scored_slots + item.range.score_offset;
}
SSD_INLINE int32_t* item_positions(const CacheLayer& layer, const Item& item) {
  return layer.positions + static_cast<int64_t>(item.row) * layer.shape.scored_slots + item.range.score_offset;
}

enum Use { kRead = 0, kWrite = 1 };

template <Use kUse, class E>
SSD_INLINE void touch(const E* from, int64_t count) {
  const char* at = reinterpret_cast<const char*>(from);
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(E)); byte += kLine)
    __builtin_prefetch(at + byte, kUse, kTouchLevel);
}

// Touches what an item needs besides the keys and values it reads. The append comes first of all, and a store that
// misses would hold up every store behind it.
template <class T>
SSD_INLINE void touch_bookkeeping(const CacheLayer& layer, const Item& item) {
  const int64_t head_dim = layer.shape.head_dim;
  const int64_t slot = next_slot(item.range, item.view);
  touch<kWrite>(first_slot<T>(layer.keys, layer, item) + slot * head_dim, head_dim);
  touch<kWrite>(first_slot<T>(layer.values, layer, item) + slot * head_dim, head_dim);
  if (item.range.score_offset >= 0) touch<kWrite>(item_scores(layer, item), item.range.capacity);
  if (item.range.kind == kHeavy && refresh_due(item.view))
    touch<kRead>(item_positions(layer, item), item.range.capacity);
}

// Touches the keys and values that the items will read, in the order in which they will be read. Does nothing for types
// that the instruction set reads faster without (kTouchesAhead).
template <class T>
class Prefetcher {
 public:
  Prefetcher(const CacheLayer& layer, const Items& items) : layer_(layer), items_(items), next_item_(items.begin) {
    advance(kTouchDistance);
  }

  SSD_ALWAYS_INLINE void advance(int64_t bytes) {
    if (!kTouchesAhead<T>) return;
    if (bytes > stop_ - at_) return cross_spans(bytes);
    touch<kRead>(at_, bytes);
    at_ += bytes;
  }

 private:
  // Out of line, so that the loops over tiles stay short.
  __attribute__((noinline)) void cross_spans(int64_t bytes) {
    while (bytes > 0) {
      if (at_ == stop_ && !next_span()) return;
      const int64_t run = bytes < stop_ - at_ ? bytes : stop_ - at_;
      touch<kRead>(at_, run);
      at_ += run;
      bytes -= run;
    }
  }

  bool next_span() {
    if (span_ == num_spans_ && !next_item()) return false;
    at_ = spans_[span_].at;
    stop_ = at_ + spans_[span_].bytes;
    ++span_;
    return true;
  }

  bool next_item() {
    if (next_item_ == items_.end) return false;
    const Item item = item_at(layer_, items_.row_by_row, next_item_++);
    span_ = num_spans_ = 0;
    add_segments(first_slot<T>(layer_.keys, layer_, item), item);
    add_segments(first_slot<T>(layer_.values, layer_, item), item);
    return true;
  }

  void add_segments(const T* first, const Item& item) {
    const int64_t slot_bytes = layer_.shape.head_dim * static_cast<int64_t>(sizeof(T));
    for (int32_t s = 0; s < item.num_segments; ++s) {
      const Segment segment = item.segments[s];
      spans_[num_spans_++] = {reinterpret_cast<const char*>(first) + segment.begin * slot_bytes,
                              segment.count * slot_bytes};
    }
  }

  struct Span {
    const char* at;
    int64_t bytes;
  };

  const CacheLayer& layer_;
  const Items& items_;
  int64_t next_item_;
  Span spans_[2 * 3];
  int32_t num_spans_ = 0;
  int32_t span_ = 0;
  const char* at_ = nullptr;
  const char* stop_ = nullptr;
};

}  // namespace
}  // namespace ssd
