// The (row, head) items of a decode step: where each one's kept set lies, and touching it ahead of its use.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "common/layer.h"
#include "cpu/simd.h"

namespace ssd {
namespace {

constexpr int64_t kLine = 64;

// An item's place: which row and head, and where its kept set lies.
struct Item {
  int32_t row;
  int32_t head;
  int32_t prompt;  // the shared one that the row reads
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
  item.prompt = layer.shape.shared_prompts ? layer.prompt_of[item.row] : 0;
  item.range = layer.heads[item.head];
  item.view = row_view(layer.shape, item.range, layer.cursors[item.row]);
  item.num_segments = live_segments(item.range, item.view, item.segments);
  return item;
}

// Whether slots of type T have scales.
template <class T>
constexpr bool kScaled = std::is_same<T, Int8>::value;

// The keys or values of an item's slots, with their scales if they have some.
template <class T>
struct Slots {
  T* own;           // of the row, from slot `apart` on
  const T* prompt;  // shared by rows, before that
  float* own_scales;
  const float* prompt_scales;
  int32_t apart;
  int64_t head_dim;

  SSD_ALWAYS_INLINE T* writable(int32_t slot) const { return own + (slot - apart) * head_dim; }
  SSD_ALWAYS_INLINE const T* at(int32_t slot) const { return slot < apart ? prompt + slot * head_dim : writable(slot); }
  SSD_ALWAYS_INLINE float* writable_scale(int32_t slot) const { return own_scales + (slot - apart); }
};

template <class T>
SSD_INLINE Slots<T> item_slots(void* slab, const void* prompts, float* scales, const float* prompt_scales,
                               const CacheLayer& layer, const Item& item) {
  const LayerShape& shape = layer.shape;
  const int64_t own = static_cast<int64_t>(item.row) * shape.slots + item.range.offset;
  const int64_t prompt = (static_cast<int64_t>(item.prompt) * shape.heads + item.head) * shape.max_prompt;
  const bool shared = shape.shared_prompts;
  return {static_cast<T*>(slab) + own * shape.head_dim,
          shared ? static_cast<const T*>(prompts) + prompt * shape.head_dim : nullptr,
          kScaled<T> ? scales + own : nullptr,
          kScaled<T> && shared ? prompt_scales + prompt : nullptr,
          item.view.apart,
          shape.head_dim};
}
template <class T>
SSD_INLINE Slots<T> item_keys(const CacheLayer& layer, const Item& item) {
  return item_slots<T>(layer.keys, layer.prompt_keys, layer.key_scales, layer.prompt_key_scales, layer, item);
}
template <class T>
SSD_INLINE Slots<T> item_values(const CacheLayer& layer, const Item& item) {
  return item_slots<T>(layer.values, layer.prompt_values, layer.value_scales, layer.prompt_value_scales, layer, item);
}

// Scores and positions of a scored item, from slot `unscored` on.
SSD_INLINE float* item_scores(const CacheLayer& layer, const Item& item) {
  return layer.scores + static_cast<int64_t>(item.row) * layer.shape.scored_slots + item.range.score_offset;
}
SSD_INLINE int32_t* item_positions(const CacheLayer& layer, const Item& item) {
  return layer.positions + static_cast<int64_t>(item.row) * layer.shape.scored_slots + item.range.score_offset;
}
SSD_INLINE int32_t scored_slots(const CacheLayer& layer, const Item& item) {
  return item.range.capacity - (layer.shape.prompt_scores ? 0 : layer.shape.max_prompt);
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
  const int32_t slot = next_slot(item.range, item.view);
  for (const Slots<T>& slots : {item_keys<T>(layer, item), item_values<T>(layer, item)}) {
    touch<kWrite>(slots.writable(slot), head_dim);
    if (kScaled<T>) touch<kWrite>(slots.own_scales, item.view.base + item.view.evictable + 1 - item.view.apart);
  }
  if (item.range.score_offset >= 0) touch<kWrite>(item_scores(layer, item), scored_slots(layer, item));
  if (item.range.kind == kHeavy && refresh_due(item.view))
    touch<kRead>(item_positions(layer, item), scored_slots(layer, item));
}

// Touches the keys and values that the items will read, in the order in which they will be read.
template <class T>
class Prefetcher {
 public:
  Prefetcher(const CacheLayer& layer, const Items& items) : layer_(layer), items_(items), next_item_(items.begin) {
    advance(kTouchDistance);
  }

  SSD_ALWAYS_INLINE void advance(int64_t bytes) {
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
    add_segments(item_keys<T>(layer_, item), item);
    add_segments(item_values<T>(layer_, item), item);
    return true;
  }

  void add_segments(const Slots<T>& slots, const Item& item) {
    for (int32_t s = 0; s < item.num_segments; ++s) {
      const Segment segment = item.segments[s];
      const int32_t before = smaller(larger(slots.apart - segment.begin, 0), segment.count);
      if (before > 0) add_span(slots, segment.begin, before);
      if (before < segment.count) add_span(slots, segment.begin + before, segment.count - before);
    }
  }

  void add_span(const Slots<T>& slots, int32_t slot, int32_t count) {
    spans_[num_spans_++] = {reinterpret_cast<const char*>(slots.at(slot)),
                            count * slots.head_dim * static_cast<int64_t>(sizeof(T))};
  }

  struct Span {
    const char* at;
    int64_t bytes;
  };

  const CacheLayer& layer_;
  const Items& items_;
  int64_t next_item_;
  Span spans_[2 * 4];
  int32_t num_spans_ = 0;
  int32_t span_ = 0;
  const char* at_ = nullptr;
  const char* stop_ = nullptr;
};

}  // namespace
}  // namespace ssd
