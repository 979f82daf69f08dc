// The decode step (docs/specification.md, section 3) for a run of (row, head) items, written once and compiled once per
// instruction set: each kernels_*.cpp defines SSD_ISA and includes this file.
//
// An item's kept set is read exactly once, keys and then values, each from front to back, and what is written is
// written when all has been read: memory is as fast as hardware prefetchers guess and stores do not wait
// (docs/benchmarks.md).
#include <cstring>
#include <type_traits>

#include "cpu/claims.h"
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
  int32_t group;

  // The new token's vectors as slots hold them. In 8 bits they are in their slots from the beginning: a tile of one
  // slot takes longer there than a store that misses.
  struct Newest {
    const T *key, *value;
  };

  // Calls f(tile, slots in it, slots before it) over an item's kept set. When several query heads share a tile it is
  // widened to floats once. Tiles in digits are the same, and so are sums, wherever the prompt lies: one that begins in
  // a shared prompt and ends behind it is copied.
  template <class F>
  SSD_ALWAYS_INLINE void each_tile(const Slots<T>& slots, const T* newest, const Item& item, F f) {
    const int dim = layer.shape.head_dim;
    int32_t done = 0;
    const auto visit = [&](const T* tile, int count) __attribute__((always_inline)) {
      if (group == 1 || kInDigits<T>) {
        f(tile, count, done);
      } else {
        for (int i = 0; i < count; ++i) {
          touch_ahead(tile + i * dim, dim);
          widen<T>(tile + i * dim, dim, 1.0f, scratch.tile + i * dim);
        }
        f(static_cast<const float*>(scratch.tile), count, done);
      }
      done += count;
    };
    for (int32_t s = 0; s < item.num_segments; ++s) {
      const Segment segment = item.segments[s];
      const bool with_newest = !kScaled<T> && item.newest == segment.begin + segment.count - 1;
      const int32_t end = segment.begin + segment.count - with_newest;
      for (int32_t slot = segment.begin; slot < end;) {
        const int32_t border = slot < slots.apart ? smaller(slots.apart, end) : end;
        const int count = smaller(kTile<T>, (kInDigits<T> ? end : border) - slot);
        const T* tile = slots.at(slot);
        if (slot + count > border) {
          T* copied = reinterpret_cast<T*>(scratch.tile);
          for (int i = 0; i < count; ++i) std::memcpy(copied + i * dim, slots.at(slot + i), sizeof(T) * dim);
          tile = copied;
        }
        visit(tile, count);
        slot += count;
      }
      if (with_newest) visit(newest, 1);
    }
  }

  // logits [group, stride] of the kept set.
  template <int kDim>
  SSD_ALWAYS_INLINE void scores_of_keys(const Slots<T>& keys, const T* newest, const Item& item, int32_t stride) {
    const int dim = layer.shape.head_dim;
    each_tile(keys, newest, item, [&](auto tile, int count, int32_t done) __attribute__((always_inline)) {
      for (int32_t g = 0; g < group; ++g)
        score_slots<kDim>(scratch.q + g * query_floats(dim), tile, count, dim, scratch.logits + g * stride + done);
    });
  }

  // acc [group, head_dim]: values weighted by `weights` [group, stride], of which ready(count) makes the first ones.
  template <int kDim, class F>
  SSD_ALWAYS_INLINE void weighted_values(const Slots<T>& values, const T* newest, const Item& item,
                                         const float* weights, int32_t stride, F ready) {
    const int dim = layer.shape.head_dim;
    std::memset(scratch.acc, 0, sizeof(float) * group * dim);
    each_tile(values, newest, item, [&](auto tile, int count, int32_t done) __attribute__((always_inline)) {
      ready(done + count);
      for (int32_t g = 0; g < group; ++g)
        accumulate_slots<kDim>(weights + g * stride + done, tile, count, dim, scratch.acc + g * dim);
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

  // A vector of the step as slots hold it: in its slot unless it is so already.
  template <class X>
  SSD_ALWAYS_INLINE const T* encode(const X* x, const Slots<T>& slots, const Item& item) {
    if constexpr (kScaled<T>) {
      const int dim = layer.shape.head_dim;
      T* slot = slots.writable(item.newest);
      widen<T>(x, dim, 1.0f, scratch.tile);
      *slots.writable_scale(item.newest) = quantise(scratch.tile, dim, slot);
      return slot;
    } else {
      return x;
    }
  }

  // The new token's key, turned in `rotated` if it is to be, and value; its score starts at 0.
  template <class X>
  SSD_ALWAYS_INLINE void stage_newest(const Slots<T>& keys, const Slots<T>& values, const Item& item, X* rotated,
                                      Newest& newest) {
    const X* k = static_cast<const X*>(step.k) + item.row * step.k_row_stride + item.head * step.k_head_stride;
    const X* v = static_cast<const X*>(step.v) + item.row * step.v_row_stride + item.head * step.v_head_stride;
    if (step.cos) {
      rotate(k, item, rotated);
      k = rotated;
    }
    newest.key = encode(k, keys, item);
    newest.value = encode(v, values, item);
    if (item.range.score_offset >= 0) {
      item_scores(layer, item)[item.newest - item.view.unscored] = 0.0f;
      item_positions(layer, item)[item.newest - item.view.unscored] = item.view.base + item.view.first + item.view.step;
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

  // Rule 4: the tokens that come first lose; winners from beyond the first M evictable slots overwrite losers there.
  // The new token is the last slot, which is free then.
  void evict(const Slots<T>& keys, const Slots<T>& values, const Item& item, const Newest& newest) {
    const int32_t count = item.view.evictable + 1;
    const int32_t keep = item.range.keep;
    float* scores = item_scores(layer, item) + item.view.base - item.view.unscored;
    int32_t* positions = item_positions(layer, item) + item.view.base - item.view.unscored;
    const auto overwrite = [&](int32_t loser, int32_t winner) {
      move_slot(keys, newest.key, item, item.view.base + winner, item.view.base + loser);
      move_slot(values, newest.value, item, item.view.base + winner, item.view.base + loser);
      scores[loser] = scores[winner];
      positions[loser] = positions[winner];
    };
    if (count == keep + 1) {
      const int32_t loser = first_to_go(layer, item, count);
      if (loser < keep) overwrite(loser, keep);
      return;
    }
    int64_t* ranks = scratch.ranks;
    rank_tokens(layer, item, count, ranks);
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

  SSD_ALWAYS_INLINE void move_slot(const Slots<T>& slots, const T* newest, const Item& item, int32_t from, int32_t to) {
    std::memcpy(slots.writable(to), from == item.newest ? newest : slots.writable(from), sizeof(T) * slots.head_dim);
    if (kScaled<T>) *slots.writable_scale(to) = *slots.writable_scale(from);
  }

  // Rules 1 and 4: the new token takes its slot, or the slot of one that is evicted for it.
  SSD_ALWAYS_INLINE void store(const Slots<T>& keys, const Slots<T>& values, const Item& item, const Newest& newest) {
    const bool full = item.view.evictable + 1 > item.range.keep;
    if (item.range.kind == kHeavy && refresh_due(item.view) && full) return evict(keys, values, item, newest);
    if (kScaled<T>) return;
    std::memcpy(keys.writable(item.newest), newest.key, sizeof(T) * keys.head_dim);
    std::memcpy(values.writable(item.newest), newest.value, sizeof(T) * values.head_dim);
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
    Newest newest;
    with_step_type([&](auto* type) __attribute__((always_inline)) {
      using X = std::remove_pointer_t<decltype(type)>;
      stage_newest<X>(keys, values, item, reinterpret_cast<X*>(scratch.rotated), newest);
      stage_queries<X>(item);
    });

    touch_beginnings(values, item);
    const int32_t count = item.view.base + item.view.evictable + 1;
    const int32_t stride = padded(count);
    scores_of_keys<kDim>(keys, newest.key, item, stride);
    for (int32_t g = 0; kScaled<T> && g < group; ++g)
      apply_scales(keys, item, scratch.unit[g], scratch.logits + g * stride);

    if (index + 1 < items.end) {
      const Item next = item_at(layer, items.row_by_row, index + 1);
      touch_bookkeeping<T>(layer, next);
      touch_beginnings(item_keys<T>(layer, next), next);
    }
    float* inverse = scratch.inverse;
    Softmax softmax(scratch.logits, count, stride);
    for (int32_t g = 1; g < group; ++g) {
      Softmax other(scratch.logits + g * stride, count, stride);
      other.advance(count);
      inverse[g] = other.inverse();
    }
    if constexpr (kScaled<T>) {
      softmax.advance(count);
      inverse[0] = softmax.inverse();
      if (item.range.score_offset >= 0) add_scores(item, stride, inverse);
      for (int32_t g = 0; g < group; ++g) {
        float* weights = scratch.logits + g * stride;
        apply_scales(values, item, 1.0f, weights);
        if constexpr (kInDigits<T>) inverse[g] *= cut_weights<T>(weights, count);
      }
    }
    weighted_values<kDim>(values, newest.value, item, scratch.logits, stride,
                          [&](int32_t some) __attribute__((always_inline)) { softmax.advance(some); });
    if constexpr (!kScaled<T>) {
      inverse[0] = softmax.inverse();
      if (item.range.score_offset >= 0) add_scores(item, stride, inverse);
    }

    const int64_t head = static_cast<int64_t>(item.row) * step.query_heads + item.head * group;
    with_step_type([&](auto* type) __attribute__((always_inline)) {
      auto* out = static_cast<decltype(type)>(step.out) + head * dim;
      for (int32_t g = 0; g < group; ++g) narrow<T>(scratch.acc + g * dim, dim, inverse[g], out + g * dim);
    });

    store(keys, values, item, newest);
  }
};

template <class T>
void decode_as(const CacheLayer& layer, const DecodeStep& step, const Items& items, const Scratch& scratch) {
  Decoder<T> decoder{layer, step, items, scratch, step.query_heads / layer.shape.heads};
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
