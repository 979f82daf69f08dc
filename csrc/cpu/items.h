// The (row, head) items of a decode step: where each one's kept set lies, and touching ahead of their use what hardware
// prefetchers do not guess.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "common/layer.h"
#include "cpu/simd.h"

namespace ssd {
namespace {

constexpr int64_t kBeginning = 4096;  // bytes

// An item's place: which row and head, and where its kept set lies.
struct Item {
  int32_t row;
  int32_t head;
  int32_t prompt;  // the shared one that the row reads
  HeadRange range;
  RowView view;
  Segment segments[3];
  int32_t num_segments;
  int32_t newest;  // slot of the new token, the last one of a segment
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
  item.newest = next_slot(item.range, item.view);
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

// What is touched before its use goes into the second-level cache.
template <class E>
SSD_INLINE void touch(const E* from, int64_t count) {
  const char* at = reinterpret_cast<const char*>(from);
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(E)); byte += kLine)
    __builtin_prefetch(at + byte, 0, 2);
}

// Touches the beginnings of what will be read from front to back: hardware prefetchers find the rest, and need a few
// lines before they do.
template <class T>
SSD_INLINE void touch_beginnings(const Slots<T>& slots, const Item& item) {
  for (int32_t s = 0; s < item.num_segments; ++s) {
    const Segment segment = item.segments[s];
    const int64_t elements = segment.count * slots.head_dim, most = kBeginning / static_cast<int64_t>(sizeof(T));
    touch(slots.at(segment.begin), elements < most ? elements : most);
  }
}

// Touches what an item needs besides the keys and values it reads.
template <class T>
SSD_INLINE void touch_bookkeeping(const CacheLayer& layer, const Item& item) {
  for (const Slots<T>& slots : {item_keys<T>(layer, item), item_values<T>(layer, item)}) {
    touch(slots.writable(item.newest), slots.head_dim);
    if (kScaled<T>) touch(slots.own_scales, item.view.base + item.view.evictable + 1 - item.view.apart);
  }
  if (item.range.score_offset >= 0) touch(item_scores(layer, item), scored_slots(layer, item));
  if (item.range.kind == kHeavy && refresh_due(item.view))
    touch(item_positions(layer, item), scored_slots(layer, item));
}

}  // namespace
}  // namespace ssd
