// Who is evicted from a heavy head: rule 4 of docs/specification.md, section 3.4.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/evict.h"
#include "common/layer.h"
#include "cpu/items.h"

namespace ssd {
namespace {

// What decides between tokens: a key and, of equal keys, a position; the lowest pair goes first. A rank is the pair in
// an integer.
struct Claims {
  const float* scores;
  const int32_t* positions;
  int32_t prompt_len, steps, protected_from;
  PinMask mask;

  // The `recent` newest tokens are always the last `recent` positions, because each of them was protected at every
  // refresh.
  Claims(const CacheLayer& layer, const Item& item)
      : scores(item_scores(layer, item) + item.view.base - item.view.unscored),
        positions(item_positions(layer, item) + item.view.base - item.view.unscored),
        prompt_len(item.view.base + item.view.first),
        steps(item.view.step + 1),
        protected_from(prompt_len + steps - item.range.recent),
        mask(pin_mask(layer.shape, layer.pinned, item.head)) {}

  template <int kRule, bool kPinned>
  SSD_ALWAYS_INLINE void of(int32_t token, int32_t& key, int32_t& position) const {
    position = positions[token];
    float score = scores[token];
    if (kRule == kMean) score /= static_cast<float>(attended_steps(position, prompt_len, steps));
    key = kRule == kPosition ? 0 : ordered_key(score);
    if (kPinned && is_pinned(mask, position, prompt_len)) key = INT32_MAX;
    const bool held = position >= protected_from;
    key = held ? INT32_MAX : key;
    position = held ? INT32_MAX : position;
  }
};

// Calls f(rule, pinned): the head's rule, and whether it has pinned tokens, as types.
template <class F>
SSD_INLINE void with_rule(const CacheLayer& layer, const Item& item, const PinMask& mask, F f) {
  int32_t any_pinned = 0;
  for (int32_t word = 0; word < pin_words(layer.shape); ++word) any_pinned |= mask.words[word];
  const auto with_pins = [&](auto rule) { any_pinned ? f(rule, std::true_type()) : f(rule, std::false_type()); };
  switch (item.range.rule) {
    case kMean:
      return with_pins(std::integral_constant<int, kMean>());
    case kPosition:
      return with_pins(std::integral_constant<int, kPosition>());
    default:
      return with_pins(std::integral_constant<int, kSum>());
  }
}

// The first of the evictable tokens [0, count) to go.
template <int kRule, bool kPinned>
SSD_INLINE int32_t lowest_claim(const Claims& claims, int32_t count) {
  constexpr int kLanes = 16;  // for compilers to turn into vectors
  int32_t keys[kLanes], positions[kLanes], tokens[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) keys[lane] = positions[lane] = INT32_MAX, tokens[lane] = count - 1;
  const auto compare = [&](int lane, int32_t token) __attribute__((always_inline)) {
    int32_t key, position;
    claims.template of<kRule, kPinned>(token, key, position);
    const bool lower = (key < keys[lane]) | ((key == keys[lane]) & (position < positions[lane]));
    keys[lane] = lower ? key : keys[lane];
    positions[lane] = lower ? position : positions[lane];
    tokens[lane] = lower ? token : tokens[lane];
  };
  for (int32_t token = 0; token < count; token += kLanes) {
    const int32_t from = smaller(token, count - kLanes);  // some may come twice
    if (from < 0) {
      for (int lane = 0; lane < count; ++lane) compare(lane, lane);
    } else {
      for (int lane = 0; lane < kLanes; ++lane) compare(lane, from + lane);
    }
  }
  for (int lane = 1; lane < kLanes; ++lane) {
    const bool lower = keys[lane] < keys[0] || (keys[lane] == keys[0] && positions[lane] < positions[0]);
    if (!lower) continue;
    keys[0] = keys[lane], positions[0] = positions[lane], tokens[0] = tokens[lane];
  }
  return tokens[0];
}

__attribute__((noinline)) int32_t first_to_go(const CacheLayer& layer, const Item& item, int32_t count) {
  const Claims claims(layer, item);
  int32_t first = count - 1;
  with_rule(layer, item, claims.mask, [&](auto rule, auto pinned) {
    first = lowest_claim<decltype(rule)::value, decltype(pinned)::value>(claims, count);
  });
  return first;
}

__attribute__((noinline)) void rank_tokens(const CacheLayer& layer, const Item& item, int32_t count,
                                           int64_t* __restrict ranks) {
  const Claims claims(layer, item);
  with_rule(layer, item, claims.mask, [&](auto rule, auto pinned) {
    for (int32_t token = 0; token < count; ++token) {
      int32_t key, position;
      claims.template of<decltype(rule)::value, decltype(pinned)::value>(token, key, position);
      ranks[token] = ordered_pair(key, position);
    }
  });
}

}  // namespace
}  // namespace ssd
