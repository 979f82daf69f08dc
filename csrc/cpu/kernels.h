// The decode step (docs/specification.md, section 3) for a run of (row, head) items, written once and compiled once per
// instruction set: each kernels_*.cpp defines SSD_ISA and includes this file.
//
// An item's kept set is read exactly once, keys and then values. On cold caches the order of reading and what is
// touched ahead of its use (items.h) decide the speed, not the instruction set.
#include <cstring>
#include <type_traits>

#include "cpu/decode.h"
#include "cpu/evict.h"
#include "cpu/items.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace ssd {
namespace {

template <class T>
struct Decoder {
  const CacheLayer& layer;
  const DecodeStep& step;
  const Items& items;
  Scratch scratch;
  Prefetcher<T> ahead;
  int32_t group;

  // Calls f(tile, slots in it, slots before it, pace) over an item's kept set, while memory ahead is touched. When
  // several query heads share the tile it is widened to floats once. So is a tile that begins in a shared prompt and
  // ends behind it: tiles are the same, and so are sums, wherever the prompt lies.
  template <class F>
  SSD_ALWAYS_INLINE void each_tile(const Slots<T>& slots, const Item& item, F f) {
    const int dim = layer.shape.head_dim;
    int32_t done = 0;
    for (int32_t s = 0; s < item.num_segments; ++s) {
      const Segment segment = item.segments[s];
      for (int32_t first = 0; first < segment.count; first += kTile<T>) {
        const int count = smaller(kTile<T>, segment.count - first);
        const int32_t slot = segment.begin + first;
        const bool together = slot >= slots.apart || slot + count <= slots.apart;
        if (group == 1 && together) {
          f(slots.at(slot), count, done, [&](int64_t bytes) __attribute__((always_inline)) { ahead.advance(bytes); });
        } else {
          ahead.advance(static_cast<int64_t>(count) * dim * sizeof(T));
          if constexpr (kInDigits<T>) {
            T* tile = reinterpret_cast<T*>(scratch.tile);
            for (int i = 0; i < count && !together; ++i) std::memcpy(tile + i * dim, slots.at(slot + i), dim);
            f(together ? slots.at(slot) : tile, count, done, [](int64_t) {});
          } else {
            for (int i = 0; i < count; ++i) widen<T>(slots.at(slot + i), dim, 1.0f, scratch.tile + i * dim);
            f(static_cast<const float*>(scratch.tile), count, done, [](int64_t) {});
          }
        }
        done += count;
      }
    }
  }

  // logits [group, stride] of the kept set.
  template <int kDim>
  SSD_ALWAYS_INLINE void scores_of_keys(const Slots<T>& keys, const Item& item, int32_t stride) {
    const int dim = layer.shape.head_dim;
    each_tile(keys, item, [&](auto tile, int count, int32_t done, auto pace) __attribute__((always_inline)) {
      for (int32_t g = 0; g < group; ++g)
        score_tile<kDim>(scratch.q + g * query_floats(dim), tile, count, dim, scratch.logits + g * stride + done, pace);
    });
  }

  // acc [group, head_dim]: values weighted by what stands in logits.
  template <int kDim>
  SSD_ALWAYS_INLINE void weighted_values(const Slots<T>& values, const Item& item, int32_t stride) {
    const int dim = layer.shape.head_dim;
    std::memset(scratch.acc, 0, sizeof(float) * group * dim);
    each_tile(values, item, [&](auto tile, int count, int32_t done, auto pace) __attribute__((always_inline)) {
      for (int32_t g = 0; g < group; ++g)
        accumulate_tile<kDim>(scratch.logits + g * stride + done, tile, count, dim, scratch.acc + g * dim, pace);
    });
  }

  // What stands in logits of a query head times `unit` and the scales of the slots.
  SSD_ALWAYS_INLINE void apply_scales(const Slots<T>& slots, const Item& item, float unit, float* logits) {
    for (int32_t s = 0; s < item.num_segments; ++s) {
      const Segment segment = item.segments[s];
      const int32_t before = smaller(larger(slots.apart - segment.begin, 0), segment.count);
      if (before > 0) multiply(unit, slots.prompt_scales + segment.begin, before, logits);
      const float* own = slots.own_scales + (segment.begin + before - slots.apart);
      multiply(unit, own, segment.count - before, logits + before);
      logits += segment.count;
    }
  }

  // Calls f with a null pointer of the type of q, k, v and out: that of the slots, unless these are bytes.
  template <class F>
  SSD_ALWAYS_INLINE void with_step_type(F f) {
    if constexpr (kScaled<T>) {
      switch (layer.dtype) {
        case kFloat32:
          return f(static_cast<float*>(nullptr));
        case kBFloat16:
          return f(static_cast<BFloat16*>(nullptr));
        case kFloat16:
          return f(static_cast<Float16*>(nullptr));
      }
    } else {
      f(static_cast<T*>(nullptr));
    }
  }

  // Turns the pairs (i, i + head_dim / 2) of a vector by the new token's angles.
  template <class X>
  SSD_ALWAYS_INLINE void rotate(const X* x, const Item& item, X* to) {
    const int half = layer.shape.head_dim / 2;
    const int64_t position = item.view.base + item.view.first + item.view.step;
    const float* cos = step.cos + position * half;
    const float* sin = step.sin + position * half;
    for (int i = 0; i < half; ++i) {
      const float a = to_float(x[i]), b = to_float(x[i + half]);
      from_float(a * cos[i] - b * sin[i], to + i);
      from_float(b * cos[i] + a * sin[i], to + i + half);
    }
  }

  // A vector of the step into a slot.
  template <class X>
  SSD_ALWAYS_INLINE void store_slot(const X* x, const Slots<T>& slots, int32_t slot) {
    const int dim = layer.shape.head_dim;
    if constexpr (kScaled<T>) {
      widen<T>(x, dim, 1.0f, scratch.tile);
      *slots.writable_scale(slot) = quantise(scratch.tile, dim, slots.writable(slot));
    } else {
      std::memcpy(slots.writable(slot), x, sizeof(T) * dim);
    }
  }

  // Rule 1. The new token's slot in the slabs; its score starts at 0.
  template <class X>
  SSD_ALWAYS_INLINE void append(const Slots<T>& keys, const Slots<T>& values, const Item& item) {
    const int32_t slot = next_slot(item.range, item.view);
    const X* k = static_cast<const X*>(step.k) + item.row * step.k_row_stride + item.head * step.k_head_stride;
    const X* v = static_cast<const X*>(step.v) + item.row * step.v_row_stride + item.head * step.v_head_stride;
    X rotated[kMaxHeadDim];
    if (step.cos) {
      rotate(k, item, rotated);
      k = rotated;
    }
    store_slot(k, keys, slot);
    store_slot(v, values, slot);
    if (item.range.score_offset >= 0) {
      item_scores(layer, item)[slot - item.view.unscored] = 0.0f;
      item_positions(layer, item)[slot - item.view.unscored] = item.view.base + item.view.first + item.view.step;
    }
  }

  // Slots of a segment that have no scores: the first ones.
  SSD_ALWAYS_INLINE int32_t unscored(const Item& item, const Segment& segment) {
    return smaller(larger(item.view.unscored - segment.begin, 0), segment.count);
  }

  // What rule 3 does first where scores decay.
  SSD_ALWAYS_INLINE void decay_scores(const Item& item) {
    for (int32_t s = 0; s < item.num_segments; ++s) {
      const Segment segment = item.segments[s];
      float* scores = item_scores(layer, item) - item.view.unscored + segment.begin;
      for (int32_t i = unscored(item, segment); i < segment.count; ++i) scores[i] *= kDecay;
    }
  }

  // Rule 3: every attended slot gains its probability, once per query head of the group.
  SSD_ALWAYS_INLINE void add_scores(const Item& item, int32_t stride, const float* inverse) {
    if (item.range.rule == kDecayed) decay_scores(item);
    for (int32_t g = 0; g < group; ++g) {
      const float* __restrict numerators = scratch.logits + g * stride;
      const float factor = inverse[g];
      for (int32_t s = 0; s < item.num_segments; ++s) {
        const Segment segment = item.segments[s];
        float* __restrict scores = item_scores(layer, item) - item.view.unscored + segment.begin;
        for (int32_t i = unscored(item, segment); i < segment.count; ++i) scores[i] += numerators[i] * factor;
        numerators += segment.count;
      }
    }
  }

  // Where the scores and positions of evictable tokens begin.
  SSD_ALWAYS_INLINE int32_t first_evictable(const Item& item) { return item.view.base - item.view.unscored; }

  // Eviction ranks of the evictable tokens [0, count). The `recent` newest tokens are always the last `recent`
  // positions, because each of them was protected at every refresh.
  template <int kRule>
  SSD_ALWAYS_INLINE void rank(const Item& item, int32_t count, int64_t* __restrict ranks) {
    const float* __restrict scores = item_scores(layer, item) + first_evictable(item);
    const int32_t* __restrict positions = item_positions(layer, item) + first_evictable(item);
    const int32_t prompt_len = item.view.base + item.view.first;
    const int32_t steps = item.view.step + 1;
    const int32_t protected_from = prompt_len + steps - item.range.recent;
    for (int32_t i = 0; i < count; ++i) {
      float key = scores[i];
      if (kRule == kMean) key /= static_cast<float>(attended_steps(positions[i], prompt_len, steps));
      const int64_t value = kRule == kPosition ? positions[i] : eviction_rank(key, positions[i]);
      ranks[i] = positions[i] >= protected_from ? kProtected : value;
    }
  }

  // Lifts the pinned of the tokens [0, count) above the others. A pass of its own, so that heads without pinned tokens
  // have nothing to do with it.
  SSD_ALWAYS_INLINE void lift_pinned(const Item& item, int32_t count, const PinMask& mask, int64_t* ranks) {
    const int32_t* positions = item_positions(layer, item) + first_evictable(item);
    const int32_t prompt_len = item.view.base + item.view.first;
    for (int32_t i = 0; i < count; ++i)
      if (ranks[i] != kProtected && is_pinned(mask, positions[i], prompt_len)) ranks[i] = pinned_rank(positions[i]);
  }

  SSD_ALWAYS_INLINE void rank_by_rule(const Item& item, int32_t count, int64_t* ranks) {
    switch (item.range.rule) {
      case kMean:
        return rank<kMean>(item, count, ranks);
      case kPosition:
        return rank<kPosition>(item, count, ranks);
      default:
        return rank<kSum>(item, count, ranks);
    }
  }

  // Rule 4: the tokens of lowest rank lose; winners from beyond the first M evictable slots overwrite losers there.
  SSD_ALWAYS_INLINE void evict(const Slots<T>& keys, const Slots<T>& values, const Item& item) {
    const int32_t count = item.view.evictable + 1;
    const int32_t keep = item.range.keep;
    if (count <= keep) return;
    float* scores = item_scores(layer, item) + first_evictable(item);
    int32_t* positions = item_positions(layer, item) + first_evictable(item);
    int64_t* ranks = scratch.ranks;
    rank_by_rule(item, count, ranks);
    const PinMask mask = pin_mask(layer.shape, layer.pinned, item.head);
    int32_t any_pinned = 0;
    for (int32_t word = 0; word < pin_words(layer.shape); ++word) any_pinned |= mask.words[word];
    if (any_pinned) lift_pinned(item, count, mask, ranks);
    const auto overwrite = [&](int32_t loser, int32_t winner) {
      move_slot(keys, item.view.base + winner, item.view.base + loser);
      move_slot(values, item.view.base + winner, item.view.base + loser);
      scores[loser] = scores[winner];
      positions[loser] = positions[winner];
    };
    if (count == keep + 1) {
      // A loop of its own, which compilers turn into vectors.
      int64_t lowest = kProtected;
      for (int32_t i = 0; i < count; ++i) lowest = ranks[i] < lowest ? ranks[i] : lowest;
      // Ranks end in the token's position, and positions are distinct.
      const int32_t position = static_cast<int32_t>(lowest);
      int32_t loser = keep;
      for (int32_t i = 0; i < keep; ++i) loser = positions[i] == position ? i : loser;
      if (loser < keep) overwrite(loser, keep);
      return;
    }
    std::memcpy(ranks + count, ranks, sizeof(int64_t) * count);
    const int64_t losing = losing_rank(ranks + count, count, keep);
    int32_t winner = keep;
    for (int32_t loser = 0; loser < keep; ++loser) {
      if (ranks[loser] > losing) continue;
      while (winner < count && ranks[winner] <= losing) ++winner;
      if (winner == count) break;
      overwrite(loser, winner++);
    }
  }

  SSD_ALWAYS_INLINE void move_slot(const Slots<T>& slots, int32_t from, int32_t to) {
    std::memcpy(slots.writable(to), slots.writable(from), sizeof(T) * slots.head_dim);
    if (kScaled<T>) *slots.writable_scale(to) = *slots.writable_scale(from);
  }

  // The queries of an item, in floats. The softmax's scale rides on them.
  template <class X>
  SSD_ALWAYS_INLINE void stage_queries(const Item& item) {
    const int dim = layer.shape.head_dim;
    const X* q = static_cast<const X*>(step.q) + item.row * step.q_row_stride + item.head * group * step.q_head_stride;
    X rotated[kMaxHeadDim];
    for (int32_t g = 0; g < group; ++g) {
      const X* query = q + g * step.q_head_stride;
      if (step.cos) {
        rotate(query, item, rotated);
        query = rotated;
      }
      float* staged = scratch.q + g * query_floats(dim);
      widen<T>(query, dim, step.scale, staged);
      scratch.unit[g] = 1.0f;
      if constexpr (kInDigits<T>) scratch.unit[g] = cut_query<X>(staged, dim);
    }
  }

  template <int kDim>
  void run(int64_t index) {
    const int dim = layer.shape.head_dim;
    const Item item = item_at(layer, items.row_by_row, index);
    const Slots<T> keys = item_keys<T>(layer, item), values = item_values<T>(layer, item);
    with_step_type([&](auto* type) __attribute__((always_inline)) {
      using X = std::remove_pointer_t<decltype(type)>;
      append<X>(keys, values, item);
      stage_queries<X>(item);
    });

    const int32_t count = item.view.base + item.view.evictable + 1;
    const int32_t stride = padded(count);
    scores_of_keys<kDim>(keys, item, stride);
    float* inverse = scratch.inverse;
    for (int32_t g = 0; g < group; ++g) {
      float* logits = scratch.logits + g * stride;
      if (kScaled<T>) apply_scales(keys, item, scratch.unit[g], logits);
      inverse[g] = softmax_numerators(logits, count, stride);
    }
    if (item.range.score_offset >= 0) add_scores(item, stride, inverse);
    if (index + 1 < items.end) touch_bookkeeping<T>(layer, item_at(layer, items.row_by_row, index + 1));
    for (int32_t g = 0; kScaled<T> && g < group; ++g) {
      float* weights = scratch.logits + g * stride;
      apply_scales(values, item, 1.0f, weights);
      if constexpr (kInDigits<T>) inverse[g] *= cut_weights<T>(weights, count);
    }
    weighted_values<kDim>(values, item, stride);

    const int64_t head = static_cast<int64_t>(item.row) * step.query_heads + item.head * group;
    with_step_type([&](auto* type) __attribute__((always_inline)) {
      auto* out = static_cast<decltype(type)>(step.out) + head * dim;
      for (int32_t g = 0; g < group; ++g) narrow<T>(scratch.acc + g * dim, dim, inverse[g], out + g * dim);
    });

    if (item.range.kind == kHeavy && refresh_due(item.view)) evict(keys, values, item);
  }
};

template <class T>
void decode_as(const CacheLayer& layer, const DecodeStep& step, const Items& items, const Scratch& scratch) {
  Decoder<T> decoder{layer, step, items, scratch, Prefetcher<T>(layer, items), step.query_heads / layer.shape.heads};
  touch_bookkeeping<T>(layer, item_at(layer, items.row_by_row, items.begin));
  switch (layer.shape.head_dim) {
    case 64:
      for (int64_t index = items.begin; index < items.end; ++index) decoder.template run<64>(index);
      break;
    case 128:
      for (int64_t index = items.begin; index < items.end; ++index) decoder.template run<128>(index);
      break;
    default:
      for (int64_t index = items.begin; index < items.end; ++index) decoder.template run<0>(index);
  }
}

}  // namespace

namespace SSD_ISA {

void decode_items(const CacheLayer& layer, const DecodeStep& step, const Items& items, const Scratch& scratch) {
  if (layer.kv_format == kInt8) return decode_as<Int8>(layer, step, items, scratch);
  switch (layer.dtype) {
    case kFloat32:
      return decode_as<float>(layer, step, items, scratch);
    case kBFloat16:
      return decode_as<BFloat16>(layer, step, items, scratch);
    case kFloat16:
      return decode_as<Float16>(layer, step, items, scratch);
  }
}

}  // namespace SSD_ISA
}  // namespace ssd
