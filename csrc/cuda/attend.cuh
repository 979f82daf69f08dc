// Attention of a block over its part of a head's kept tokens: the stream of slots, logits, and sums of values.
//
// Keys and then values stream through shared memory in asynchronous 16-byte copies, several stages ahead of the
// arithmetic and without a pause between the two: while the logits are turned into probabilities, values are already
// under way. Every thread copies what it will read itself, so the stream needs no barriers.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/decode.h"
#include "cuda/item.cuh"
#include "cuda/port.cuh"

namespace ssd::cuda {

// How slots are shared out to lanes: `lanes` neighbouring lanes read one slot, 16 bytes each and kCopies times.
template <class T, int kDim>
struct Geometry {
  static constexpr int kVector = 16 / sizeof(T);  // elements of a chunk
  static constexpr int kCopies = kDim == 0 && sizeof(T) == 4 ? 2 : 1;
  static constexpr int kDepth = kChunksPerStage / kCopies;  // slots of a lane per stage
  int32_t dim_, lane_bits_;

  SSD_DEVICE explicit Geometry(int32_t head_dim) : dim_(head_dim), lane_bits_(0) {
    while ((kCopies * kVector) << lane_bits_ < dim()) ++lane_bits_;
  }
  SSD_DEVICE int32_t dim() const { return kDim ? kDim : dim_; }
  SSD_DEVICE int32_t lanes() const { return 1 << lane_bits_; }
  SSD_DEVICE int32_t chunks() const { return dim() / kVector; }
  SSD_DEVICE int32_t groups() const { return kThreads >> lane_bits_; }  // slots read at once by the block
  SSD_DEVICE int32_t slot_bytes() const { return dim() * static_cast<int32_t>(sizeof(T)); }
};

template <class T, int kDim, int kGroup>
struct Attention {
  using Shape = Geometry<T, kDim>;
  using Memory = Shared<kDim ? kDim : kMaxHeadDim, kGroup>;
  static constexpr int kVector = Shape::kVector, kCopies = Shape::kCopies, kDepth = Shape::kDepth;

  const CacheLayer& layer;
  const Item& item;
  const Shape shape;
  Memory& shared;
  const T* const keys;  // of the head's range
  const T* const values;
  const int32_t begin;  // the part's kept tokens are [begin, begin + count)
  const int32_t count;
  const bool appends;   // the head's first part has the new token
  const int32_t gap;    // item.gap, from `begin` on
  const int32_t apart;  // item.view.apart, from `begin` on
  int32_t tiles;        // of keys; and as many of values
  // The first chunk that this lane reads of its first token.
  const char* lane_keys;
  const char* lane_values;
  // And of its second token of the next tile to copy, up to tile run_end: a copy's address reaches 2 KB either way.
  const char* next = nullptr;
  int32_t run_end = 0;

  SSD_DEVICE Attention(const CacheLayer& layer, const Item& item)
      : layer(layer),
        item(item),
        shape(layer.shape.head_dim),
        shared(*reinterpret_cast<Memory*>(port::shared_memory())),
        keys(first_slot(layer.keys)),
        values(first_slot(layer.values)),
        begin(item.part * kPartSlots),
        count(larger(smaller(item.total - begin, kPartSlots), 0)),
        appends(item.part == 0),
        gap(item.gap - begin),
        apart(item.view.apart - begin) {
    tiles = whole_tiles(count + tile_tokens() - 1);
    const int64_t first = static_cast<int64_t>(begin + slot_group()) * shape.slot_bytes() + lane() * 16;
    lane_keys = port::whole(reinterpret_cast<const char*>(keys) + first);
    lane_values = port::whole(reinterpret_cast<const char*>(values) + first);
  }

  // What the row's own slots are counted from: beside the slab, if the first ones are in a shared prompt.
  SSD_DEVICE const T* first_slot(const void* slab) const {
    const int64_t slot = static_cast<int64_t>(item.row) * layer.shape.slots + item.offset - item.view.apart;
    return static_cast<const T*>(slab) + slot * shape.dim();
  }

  // Bytes from there to what slots of the shared prompt are counted from.
  SSD_DEVICE int64_t to_prompt(bool is_key) const {
    const LayerShape& sizes = layer.shape;
    const int64_t slot = (static_cast<int64_t>(shared.prompt) * sizes.heads + item.head) * sizes.max_prompt;
    const char* prompt = static_cast<const char*>(is_key ? layer.prompt_keys : layer.prompt_values);
    return prompt + slot * shape.slot_bytes() - reinterpret_cast<const char*>(is_key ? keys : values);
  }

  SSD_DEVICE int32_t lane() const { return port::thread_index() & (shape.lanes() - 1); }  // among those of its slot
  SSD_DEVICE int32_t slot_group() const { return port::thread_index() >> shape.lane_bits_; }
  SSD_DEVICE int32_t chunk(int copy) const { return lane() + copy * shape.lanes(); }
  SSD_DEVICE bool has_chunk(int copy) const { return kDim || chunk(copy) < shape.chunks(); }
  SSD_DEVICE int32_t tile_tokens() const { return shape.groups() * kDepth; }
  SSD_DEVICE int32_t whole_tiles(uint32_t tokens) const { return tokens * shape.lanes() / (kThreads * kDepth); }
  // The token of this part that this thread reads in a tile, maybe beyond the last.
  SSD_DEVICE int32_t token(int32_t tile, int depth) const {
    return (tile * kDepth + depth) * shape.groups() + slot_group();
  }
  SSD_DEVICE Chunk& staged(int32_t tile, int depth, int copy) const {
    return shared.stages[(tile % kStages * kDepth + depth) * kCopies + copy][port::thread_index()];
  }

  // Starts to copy what this thread needs of a tile: of each in turn, keys' tiles coming before values'.
  SSD_DEVICE void copy_tile(int32_t index) {
    if (index == run_end && !start_run(index)) return;
    const int32_t step = shape.groups() * shape.slot_bytes();
    const char* from = next;
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth)
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy)
        if (has_chunk(copy))
          port::copy16_async(&staged(index, depth, copy), from + (depth - 1) * step + copy * shape.lanes() * 16);
    next = from + kDepth * step;
  }

  // Finds how many whole tiles lie side by side from this one on. If not even this one does, copies it slot by slot
  // and returns false.
  SSD_DEVICE bool start_run(int32_t index) {
    run_end = index + 1;
    if (index >= 2 * tiles) return false;
    const bool is_key = index < tiles;
    const int32_t tile = is_key ? index : index - tiles, first = tile * tile_tokens();
    const int64_t skip = static_cast<int64_t>(item.skip) * shape.slot_bytes();
    const int64_t prompt = first < apart ? to_prompt(is_key) : 0;
    // Bytes that a token lies further than it would if all lay side by side.
    const auto further = [&](int32_t j) { return j < apart ? prompt : j < gap ? 0 : skip; };
    const char* from = (is_key ? lane_keys : lane_values) + static_cast<int64_t>(first) * shape.slot_bytes();
    const int32_t until = first < apart ? apart : first < gap ? gap : count;  // its first token's neighbours
    const int32_t whole = whole_tiles(smaller(until, count));
    if (tile < whole) {
      run_end += whole - tile - 1;
      next = from + further(first) + shape.groups() * shape.slot_bytes();
      return true;
    }
    if (until >= count)
      copy_slots(index, tile, from + further(first), [](int32_t) { return 0; });
    else
      copy_slots(index, tile, from, further);
    return false;
  }

  // Zeros arrive of tokens beyond the last, of which nothing is read.
  template <class Offset>
  SSD_DEVICE void copy_slots(int32_t index, int32_t tile, const char* from, Offset further) const {
    const int32_t step = shape.groups() * shape.slot_bytes();
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      const int32_t j = token(tile, depth);
      const char* slot = from + depth * step + further(j);
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy)
        if (has_chunk(copy))
          port::copy16_async(&staged(index, depth, copy), slot + copy * shape.lanes() * 16, j < count);
    }
  }
  // Always one group of copies.
  SSD_DEVICE void fetch(int32_t index) {
    copy_tile(index);
    port::commit_copies();
  }

  // A chunk of this lane as floats.
  SSD_DEVICE void load(int32_t tile, int depth, int copy, float to[kVector]) const {
    port::widen(staged(tile, depth, copy), to, T{});
  }

  SSD_DEVICE void load_queries(float q[kGroup][kCopies][kVector]) const {
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy)
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          q[g][copy][i] = has_chunk(copy) ? shared.queries[g][chunk(copy) * kVector + i] : 0.0f;
  }

  // Adds up dot [kDepth] over the lanes of a slot. They halve what they hold until each has one depth, which is less
  // than half the exchanges of adding up one depth after the other.
  SSD_DEVICE float reduce(float dot[kDepth]) const {
    int mask = shape.lanes() / 2;
#pragma unroll
    for (int half = kDepth / 2; half > 0; half /= 2) {
      const bool upper = lane() & mask;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float kept = upper ? dot[i + half] : dot[i], given = upper ? dot[i] : dot[i + half];
        dot[i] = kept + port::shuffle_xor(given, mask);
      }
      mask /= 2;
    }
    for (; mask > 0; mask /= 2) dot[0] += port::shuffle_xor(dot[0], mask);
    return dot[0];
  }

  // The part's logits into shared memory, -inf for tokens of the last tile that are not there, and the new token's at
  // kNewToken.
  SSD_DEVICE void attend_keys(const float q[kGroup][kCopies][kVector]) {
    const int32_t lanes_per_depth = shape.lanes() / kDepth;
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; ++tile) {
      port::wait_copies<kStages - 2>();
      fetch(tile + kStages - 1);
      float dot[kGroup][kDepth] = {};
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth) {
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy) {
          if (!has_chunk(copy)) continue;
          float key[kVector];
          load(tile, depth, copy, key);
#pragma unroll
          for (int g = 0; g < kGroup; ++g)
#pragma unroll
            for (int i = 0; i < kVector; ++i) dot[g][depth] += q[g][copy][i] * key[i];
        }
      }
      const int32_t j = token(tile, lane() / lanes_per_depth);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const float logit = reduce(dot[g]);
        if (lane() % lanes_per_depth == 0) shared.logits[g][j] = j < count ? logit : -INFINITY;
      }
    }
    if (appends) attend_fresh(q);
  }

  // All lanes read the new token, and the block's first one keeps the logits.
  SSD_DEVICE void attend_fresh(const float q[kGroup][kCopies][kVector]) const {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float dot = 0.0f;
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy)
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (has_chunk(copy)) dot += q[g][copy][i] * shared.fresh[0][chunk(copy) * kVector + i];
      for (int mask = shape.lanes() / 2; mask > 0; mask /= 2) dot += port::shuffle_xor(dot, mask);
      if (port::thread_index() == 0) shared.logits[g][kNewToken] = dot;
    }
  }

  // Maximum and sum of powers of the part's logits: by every warp for itself, which takes less than a barrier more.
  // The maximum is never -inf, so that logits that are have powers of 0 and not NaN, even where there are no others.
  SSD_DEVICE void normalize(float highest[kGroup], float norm[kGroup]) const {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      highest[g] = appends ? fmaxf(-FLT_MAX, shared.logits[g][kNewToken]) : -FLT_MAX;
#pragma unroll 2
      for (int32_t j = port::lane_index(); j < count; j += port::kWarp)
        highest[g] = fmaxf(highest[g], shared.logits[g][j]);
#pragma unroll
      for (int mask = port::kWarp / 2; mask > 0; mask /= 2)
        highest[g] = fmaxf(highest[g], port::shuffle_xor(highest[g], mask));
      const bool adds_new = appends && port::lane_index() == 0;
      norm[g] = adds_new ? port::power_of_two(shared.logits[g][kNewToken] - highest[g]) : 0.0f;
#pragma unroll 2
      for (int32_t j = port::lane_index(); j < count; j += port::kWarp)
        norm[g] += port::power_of_two(shared.logits[g][j] - highest[g]);
#pragma unroll
      for (int mask = port::kWarp / 2; mask > 0; mask /= 2) norm[g] += port::shuffle_xor(norm[g], mask);
    }
  }

  // This lane's elements of the sums of values [kGroup, head_dim], over its own slots.
  SSD_DEVICE void attend_values(const float highest[kGroup], float acc[kGroup][kCopies][kVector]) {
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; ++tile) {
      port::wait_copies<kStages - 2>();
      fetch(tiles + tile + kStages - 1);
      float weight[kDepth][kGroup];
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth)
#pragma unroll
        for (int g = 0; g < kGroup; ++g)
          weight[depth][g] = port::power_of_two(shared.logits[g][token(tile, depth)] - highest[g]);
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth)
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy) {
          if (!has_chunk(copy)) continue;
          float value[kVector];
          load(tiles + tile, depth, copy, value);
#pragma unroll
          for (int g = 0; g < kGroup; ++g)
#pragma unroll
            for (int i = 0; i < kVector; ++i) acc[g][copy][i] += weight[depth][g] * value[i];
        }
    }
  }

  // Adds up the sums of values within each warp, into shared memory.
  SSD_DEVICE void share_sums(float acc[kGroup][kCopies][kVector]) const {
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy) {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          for (int mask = shape.lanes(); mask < port::kWarp; mask *= 2)
            acc[g][copy][i] += port::shuffle_xor(acc[g][copy][i], mask);
        if (port::lane_index() >= shape.lanes() || !has_chunk(copy)) continue;
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          shared.sums[port::warp_index()][g][chunk(copy) * kVector + i] = acc[g][copy][i];
      }
  }

  // Sum of values of one element, all warps' and the new token's.
  SSD_DEVICE float sum(int g, int32_t e, float highest) const {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += shared.sums[warp][g][e];
    if (appends) total += port::power_of_two(shared.logits[g][kNewToken] - highest) * shared.fresh[1][e];
    return total;
  }
};

}  // namespace ssd::cuda
