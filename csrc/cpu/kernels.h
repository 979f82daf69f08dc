// The decode step of SPEC section 3 for a run of (row, head) items, written once and compiled once per instruction
// set: each kernels_*.cpp defines SSD_ISA and includes this file.
//
// An item's kept set is read exactly once, keys and then values, and a prefetcher walks the same bytes a fixed
// distance ahead, across the seams between keys, values and items: on cold caches that, not the instruction set,
// decides the speed.
#include <cmath>
#include <cstring>

#include "cpu/decode.h"
#include "cpu/evict.h"
#include "cpu/simd.h"

namespace ssd {
namespace {

constexpr int kTile = 8;  // slots scored or accumulated together
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

SSD_INLINE Item item_at(const CacheLayer& layer, int64_t index) {
  Item item;
  item.row = static_cast<int32_t>(index % layer.shape.batch);
  item.head = layer.heads[index / layer.shape.batch].launch_order;
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

// Touches the bytes that the items [begin, end) will read, in the order in which they will be read.
template <class T>
class Prefetcher {
 public:
  Prefetcher(const CacheLayer& layer, int64_t begin, int64_t end) : layer_(layer), next_item_(begin), end_(end) {}

  SSD_ALWAYS_INLINE void advance(int64_t bytes) {
    while (bytes > 0) {
      if (at_ == stop_ && !next_span()) return;
      const int64_t run = bytes < stop_ - at_ ? bytes : stop_ - at_;
      for (int64_t line = 0; line < run; line += kLine) prefetch(at_ + line);
      at_ += run;
      bytes -= run;
    }
  }

 private:
  bool next_span() {
    if (span_ == num_spans_ && !next_item()) return false;
    at_ = spans_[span_].at;
    stop_ = at_ + spans_[span_].bytes;
    ++span_;
    return true;
  }

  bool next_item() {
    if (next_item_ == end_) return false;
    const Item item = item_at(layer_, next_item_++);
    span_ = num_spans_ = 0;
    T* keys = first_slot<T>(layer_.keys, layer_, item);
    T* values = first_slot<T>(layer_.values, layer_, item);
    // The append comes first of all; a store that misses would hold up every store behind it.
    const int64_t slot_bytes = layer_.shape.head_dim * static_cast<int64_t>(sizeof(T));
    const int64_t slot = next_slot(item.range, item.view) * slot_bytes;
    for (int64_t line = 0; line < slot_bytes; line += kLine) {
      prefetch_for_writing(reinterpret_cast<const char*>(keys) + slot + line);
      prefetch_for_writing(reinterpret_cast<const char*>(values) + slot + line);
    }
    add_segments(keys, layer_.shape.head_dim, item);
    if (item.range.score_offset >= 0) add_segments(item_scores(layer_, item), 1, item);
    if (item.range.kind == kHeavy && refresh_due(item.view)) add_segments(item_positions(layer_, item), 1, item);
    add_segments(values, layer_.shape.head_dim, item);
    return true;
  }

  template <class E>
  void add_segments(const E* first, int64_t elements_per_slot, const Item& item) {
    for (int32_t s = 0; s < item.num_segments; ++s) {
      const Segment segment = item.segments[s];
      spans_[num_spans_++] = {reinterpret_cast<const char*>(first + segment.begin * elements_per_slot),
                              static_cast<int64_t>(sizeof(E)) * segment.count * elements_per_slot};
    }
  }

  struct Span {
    const char* at;
    int64_t bytes;
  };

  const CacheLayer& layer_;
  int64_t next_item_;
  int64_t end_;
  Span spans_[4 * 3];
  int32_t num_spans_ = 0;
  int32_t span_ = 0;
  const char* at_ = nullptr;
  const char* stop_ = nullptr;
};

// dot[u] += q . keys[u] over head_dim elements, for kSlots slots `dim` apart.
template <int kSlots, class T>
SSD_INLINE void dot_slots(const float* q, const T* keys, int dim, Vec dot[kSlots]) {
  int d = 0;
  for (; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth) {
    const Vec qa = load(q + d), qb = load(q + d + Vec::kWidth);
    for (int u = 0; u < kSlots; ++u) {
      Vec a, b;
      load_pair(keys + u * dim + d, a, b);
      dot[u] = fma(qb, b, fma(qa, a, dot[u]));
    }
  }
  for (; d + Vec::kWidth <= dim; d += Vec::kWidth)
    for (int u = 0; u < kSlots; ++u) dot[u] = fma(load(q + d), load(keys + u * dim + d), dot[u]);
  if (d < dim)
    for (int u = 0; u < kSlots; ++u) dot[u] = fma(load_half(q + d), load_half(keys + u * dim + d), dot[u]);
}

// logits[0, count) = q . k for `count` consecutive slots. kDim 0 takes the head_dim at run time.
template <int kDim, class T>
SSD_INLINE void score_tile(const float* q, const T* keys, int count, int head_dim, float* logits) {
  const int dim = kDim ? kDim : head_dim;
  int slot = 0;
  for (; slot + 4 <= count; slot += 4) {
    Vec dot[4] = {zero(), zero(), zero(), zero()};
    dot_slots<4>(q, keys + static_cast<int64_t>(slot) * dim, dim, dot);
    sum_four(dot, logits + slot);
  }
  for (; slot < count; ++slot) {
    Vec dot[1] = {zero()};
    dot_slots<1>(q, keys + static_cast<int64_t>(slot) * dim, dim, dot);
    logits[slot] = sum(dot[0]);
  }
}

// acc[0, 2 * kPairs * width) += sum over slots of p[slot] * value[slot].
template <int kPairs, class T>
SSD_INLINE void accumulate_block(const float* p, const T* values, int count, int dim, float* acc) {
  Vec total[2 * kPairs];
  for (int i = 0; i < 2 * kPairs; ++i) total[i] = load(acc + i * Vec::kWidth);
  for (int slot = 0; slot < count; ++slot) {
    const Vec weight = broadcast(p[slot]);
    const T* value = values + static_cast<int64_t>(slot) * dim;
    for (int i = 0; i < kPairs; ++i) {
      Vec a, b;
      load_pair(value + 2 * i * Vec::kWidth, a, b);
      total[2 * i] = fma(weight, a, total[2 * i]);
      total[2 * i + 1] = fma(weight, b, total[2 * i + 1]);
    }
  }
  for (int i = 0; i < 2 * kPairs; ++i) store(acc + i * Vec::kWidth, total[i]);
}

template <int kDim, class T>
SSD_INLINE void accumulate_tile(const float* p, const T* values, int count, int head_dim, float* acc) {
  const int dim = kDim ? kDim : head_dim;
  constexpr int kPairs = 4;  // 8 accumulators fit the registers of every instruction set
  int d = 0;
  for (; d + 2 * kPairs * Vec::kWidth <= dim; d += 2 * kPairs * Vec::kWidth)
    accumulate_block<kPairs>(p, values + d, count, dim, acc + d);
  for (; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth) accumulate_block<1>(p, values + d, count, dim, acc + d);
  for (; d < dim; d += Vec::kWidth) {
    const bool half = d + Vec::kWidth > dim;
    Vec total = half ? load_half(acc + d) : load(acc + d);
    for (int slot = 0; slot < count; ++slot) {
      const T* value = values + static_cast<int64_t>(slot) * dim + d;
      total = fma(broadcast(p[slot]), half ? load_half(value) : load(value), total);
    }
    half ? store_half(acc + d, total) : store(acc + d, total);
  }
}

// `dim` elements times `factor`, widened into lane order.
template <class T>
SSD_INLINE void widen(const T* from, int dim, float factor, float* to) {
  const Vec scale = broadcast(factor);
  int d = 0;
  for (; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth) {
    Vec a, b;
    load_pair(from + d, a, b);
    store(to + d, mul(a, scale));
    store(to + d + Vec::kWidth, mul(b, scale));
  }
  for (; d + Vec::kWidth <= dim; d += Vec::kWidth) store(to + d, mul(load(from + d), scale));
  if (d < dim) store_half(to + d, mul(load_half(from + d), scale));
}

// The way back: `dim` floats in lane order times `factor`, rounded to T in element order.
template <class T>
SSD_INLINE void narrow(const float* from, int dim, float factor, T* to) {
  const Vec scale = broadcast(factor);
  int d = 0;
  for (; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth)
    store_pair(to + d, mul(load(from + d), scale), mul(load(from + d + Vec::kWidth), scale));
  for (; d + Vec::kWidth <= dim; d += Vec::kWidth) store_narrow(to + d, mul(load(from + d), scale), Vec::kWidth);
  if (d < dim) store_narrow(to + d, mul(load_half(from + d), scale), dim - d);
}

// logits[0, padded) become exp(logit - max); returns 1 / their sum over [0, count).
SSD_INLINE float softmax_numerators(float* logits, int32_t count, int32_t padded) {
  for (int32_t i = count; i < padded; ++i) logits[i] = -INFINITY;
  Vec top = broadcast(-INFINITY);
  for (int32_t i = 0; i < padded; i += Vec::kWidth) top = max(top, load(logits + i));
  const Vec shift = broadcast(-highest(top));
  Vec total = zero();
  for (int32_t i = 0; i < padded; i += Vec::kWidth) {
    const Vec p = exp_of_negative(add(load(logits + i), shift));
    total = add(total, p);
    store(logits + i, p);
  }
  return 1.0f / sum(total);
}

template <class T>
struct Decoder {
  const CacheLayer& layer;
  const DecodeStep& step;
  Scratch scratch;
  Prefetcher<T> ahead;
  int32_t group;


  template <int kDim>
  SSD_ALWAYS_INLINE void scores_of_keys(const T* keys, const Item& item, int32_t stride) {
    const int dim = layer.shape.head_dim;
    int32_t done = 0;
    for (int32_t s = 0; s < item.num_segments; ++s) {
      const Segment segment = item.segments[s];
      for (int32_t i = 0; i < segment.count; i += kTile) {
        const int count = smaller(kTile, segment.count - i);
        ahead.advance(static_cast<int64_t>(count) * dim * sizeof(T));
        const T* tile = keys + static_cast<int64_t>(segment.begin + i) * dim;
        if (group == 1) {
          score_tile<kDim>(scratch.q, tile, count, dim, scratch.logits + done);
        } else {
          for (int i = 0; i < count; ++i) widen(tile + i * dim, dim, 1.0f, scratch.tile + i * dim);
          for (int32_t g = 0; g < group; ++g)
            score_tile<kDim>(scratch.q + g * dim, scratch.tile, count, dim, scratch.logits + g * stride + done);
        }
        done += count;
      }
    }
  }

  template <int kDim>
  SSD_ALWAYS_INLINE void weighted_values(const T* values, const Item& item, int32_t stride) {
    const int dim = layer.shape.head_dim;
    std::memset(scratch.acc, 0, sizeof(float) * group * dim);
    int32_t done = 0;
    for (int32_t s = 0; s < item.num_segments; ++s) {
      const Segment segment = item.segments[s];
      for (int32_t i = 0; i < segment.count; i += kTile) {
        const int count = smaller(kTile, segment.count - i);
        ahead.advance(static_cast<int64_t>(count) * dim * sizeof(T));
        const T* tile = values + static_cast<int64_t>(segment.begin + i) * dim;
        if (group == 1) {
          accumulate_tile<kDim>(scratch.logits + done, tile, count, dim, scratch.acc);
        } else {
          for (int i = 0; i < count; ++i) widen(tile + i * dim, dim, 1.0f, scratch.tile + i * dim);
          for (int32_t g = 0; g < group; ++g)
            accumulate_tile<kDim>(scratch.logits + g * stride + done, scratch.tile, count, dim, scratch.acc + g * dim);
        }
        done += count;
      }
    }
  }

  // Rule 1. The new token's slot in the slabs; its score starts at 0.
  SSD_ALWAYS_INLINE void append(T* keys, T* values, const Item& item) {
    const int dim = layer.shape.head_dim;
    const int32_t slot = next_slot(item.range, item.view);
    const T* k = static_cast<const T*>(step.k) + item.row * step.k_row_stride + item.head * step.k_head_stride;
    const T* v = static_cast<const T*>(step.v) + item.row * step.v_row_stride + item.head * step.v_head_stride;
    std::memcpy(keys + static_cast<int64_t>(slot) * dim, k, sizeof(T) * dim);
    std::memcpy(values + static_cast<int64_t>(slot) * dim, v, sizeof(T) * dim);
    if (item.range.score_offset >= 0) {
      item_scores(layer, item)[slot] = 0.0f;
      item_positions(layer, item)[slot] = item.view.base + item.view.first + item.view.step;
    }
  }

  // Rule 3: every attended slot gains its probability, once per query head of the group.
  SSD_ALWAYS_INLINE void add_scores(const Item& item, int32_t stride, const float* inverse) {
    for (int32_t g = 0; g < group; ++g) {
      const float* __restrict numerators = scratch.logits + g * stride;
      const float factor = inverse[g];
      for (int32_t s = 0; s < item.num_segments; ++s) {
        const Segment segment = item.segments[s];
        float* __restrict scores = item_scores(layer, item) + segment.begin;
        for (int32_t i = 0; i < segment.count; ++i) scores[i] += numerators[i] * factor;
        numerators += segment.count;
      }
    }
  }

  // Eviction ranks of the evictable tokens [0, count); returns the lowest. The `recent` newest tokens are always the last `recent`
  // positions, because each of them was protected at every refresh.
  template <int kRule>
  SSD_ALWAYS_INLINE int64_t rank(const Item& item, int32_t count, int64_t* __restrict ranks) {
    const float* __restrict scores = item_scores(layer, item) + item.view.base;
    const int32_t* __restrict positions = item_positions(layer, item) + item.view.base;
    const int32_t prompt_len = item.view.base + item.view.first;
    const int32_t steps = item.view.step + 1;
    const int32_t protected_from = prompt_len + steps - item.range.recent;
    int64_t lowest = kProtected;
    for (int32_t i = 0; i < count; ++i) {
      float key = scores[i];
      if (kRule == kMean) key /= static_cast<float>(attended_steps(positions[i], prompt_len, steps));
      const int64_t value = eviction_rank(key, positions[i]);
      ranks[i] = positions[i] >= protected_from ? kProtected : value;
      lowest = ranks[i] < lowest ? ranks[i] : lowest;
    }
    return lowest;
  }

  // Rule 4: the tokens of lowest rank lose; winners from beyond the first M evictable slots overwrite losers there.
  SSD_ALWAYS_INLINE void evict(T* keys, T* values, const Item& item) {
    const int32_t count = item.view.evictable + 1;
    const int32_t keep = item.range.keep;
    if (count <= keep) return;
    float* scores = item_scores(layer, item) + item.view.base;
    int32_t* positions = item_positions(layer, item) + item.view.base;
    int64_t* ranks = scratch.ranks;
    const int64_t lowest = item.range.rule == kMean ? rank<kMean>(item, count, ranks) : rank<kSum>(item, count, ranks);
    const auto overwrite = [&](int32_t loser, int32_t winner) {
      move_slot(keys, item.view.base + winner, item.view.base + loser);
      move_slot(values, item.view.base + winner, item.view.base + loser);
      scores[loser] = scores[winner];
      positions[loser] = positions[winner];
    };
    if (count == keep + 1) {
      int32_t loser = 0;
      while (loser < keep && ranks[loser] != lowest) ++loser;
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

  SSD_ALWAYS_INLINE void move_slot(T* slab, int32_t from, int32_t to) {
    const int64_t dim = layer.shape.head_dim;
    std::memcpy(slab + to * dim, slab + from * dim, sizeof(T) * dim);
  }

  template <int kDim>
  void run(int64_t index) {
    const int dim = layer.shape.head_dim;
    const Item item = item_at(layer, index);
    T* keys = first_slot<T>(layer.keys, layer, item);
    T* values = first_slot<T>(layer.values, layer, item);
    append(keys, values, item);

    // The scale rides on q [group, head_dim].
    const T* q = static_cast<const T*>(step.q) + item.row * step.q_row_stride + item.head * group * step.q_head_stride;
    for (int32_t g = 0; g < group; ++g) widen(q + g * step.q_head_stride, dim, step.scale, scratch.q + g * dim);

    const int32_t count = item.view.base + item.view.evictable + 1;
    const int32_t stride = padded(count);
    scores_of_keys<kDim>(keys, item, stride);
    float* inverse = scratch.inverse;
    for (int32_t g = 0; g < group; ++g)
      inverse[g] = softmax_numerators(scratch.logits + g * stride, count, stride);
    if (item.range.score_offset >= 0) add_scores(item, stride, inverse);
    weighted_values<kDim>(values, item, stride);

    const int64_t head = static_cast<int64_t>(item.row) * step.query_heads + item.head * group;
    T* out = static_cast<T*>(step.out) + head * dim;
    for (int32_t g = 0; g < group; ++g) narrow(scratch.acc + g * dim, dim, inverse[g], out + g * dim);

    if (item.range.kind == kHeavy && refresh_due(item.view)) evict(keys, values, item);
  }
};

template <class T>
void decode_as(const CacheLayer& layer, const DecodeStep& step, int64_t begin, int64_t end, const Scratch& scratch) {
  Decoder<T> decoder{layer, step, scratch, Prefetcher<T>(layer, begin, end), step.query_heads / layer.shape.heads};
  decoder.ahead.advance(kPrefetchDistance);
  switch (layer.shape.head_dim) {
    case 64:
      for (int64_t index = begin; index < end; ++index) decoder.template run<64>(index);
      break;
    case 128:
      for (int64_t index = begin; index < end; ++index) decoder.template run<128>(index);
      break;
    default:
      for (int64_t index = begin; index < end; ++index) decoder.template run<0>(index);
  }
}

}  // namespace

namespace SSD_ISA {

void decode_items(const CacheLayer& layer, const DecodeStep& step, int64_t begin, int64_t end,
                  const Scratch& scratch) {
  switch (layer.dtype) {
    case kFloat32: return decode_as<float>(layer, step, begin, end, scratch);
    case kBFloat16: return decode_as<BFloat16>(layer, step, begin, end, scratch);
    case kFloat16: return decode_as<Float16>(layer, step, begin, end, scratch);
  }
}

}  // namespace SSD_ISA
}  // namespace ssd
