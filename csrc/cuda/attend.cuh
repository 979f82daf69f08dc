// Attention of a block over its part of a head's kept tokens: the stream of slots, logits, and sums of values.
//
// Keys and then values stream through shared memory in asynchronous 16-byte copies, several stages ahead of the
// arithmetic and without a pause between the two: while the logits are turned into probabilities, values are already
// under way. Every thread copies what it will read itself, so the stream needs no barriers.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "cuda/decode.h"
#include "cuda/int8.cuh"
#include "cuda/item.cuh"
#include "cuda/port.cuh"

namespace ssd::cuda {

// How slots are shared out to lanes: `lanes` neighbouring lanes read kDepth neighbouring slots, of each a chunk and
// kCopies times.
template <class T, int kDim>
struct Geometry {
  static constexpr int kBytes = kChunkBytes<T, kDim>;
  static constexpr int kVector = kBytes / sizeof(T);  // elements of a chunk
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

// A lane's chunk of a query, and what it makes of a key's: the sum of products, added to a dot product.
template <class T, int kVector>
struct QueryChunk {
  struct Key {
    float x[kVector];
    SSD_DEVICE explicit Key(const ChunkOf<kVector * sizeof(T)>& chunk) { port::widen(chunk, x, T{}); }
    SSD_DEVICE explicit Key(const float* fresh) { memcpy(x, fresh, sizeof x); }
  };
  float x[kVector];

  template <class Memory>
  SSD_DEVICE void load(const Memory& shared, int g, int32_t chunk, bool is_there) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = is_there ? shared.queries[g][chunk * kVector + i] : 0.0f;
  }
  SSD_DEVICE void add_products(const Key& key, float& dot) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) dot += x[i] * key.x[i];
  }
};
template <int kVector>
struct QueryChunk<Int8, kVector> {
  static constexpr int kWords = kVector / 4;
  struct Key {
    ChunkOf<kVector> bytes;
    SSD_DEVICE explicit Key(const ChunkOf<kVector>& chunk) : bytes(chunk) {}
    SSD_DEVICE explicit Key(const int8_t* fresh) { memcpy(&bytes, __builtin_assume_aligned(fresh, kVector), kVector); }
  };
  uint32_t digits[kQueryDigits - 1][kWords];  // all but the lowest, which stays in shared memory

  template <class Memory>
  SSD_DEVICE void load(const Memory& shared, int g, int32_t chunk, bool is_there) {
#pragma unroll
    for (int digit = 1; digit < kQueryDigits; ++digit)
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        digits[digit - 1][i] = is_there ? shared.queries[g][digit][chunk * kWords + i] : 0;
  }
  // A digit's sum is at most kVector * 127 * 128. Each of the sums below is at most twice the sum of all products'
  // magnitudes, so that cancelling digits cost nothing.
  SSD_DEVICE void add_products(const Key& key, float& dot) const {
    int32_t sums[kQueryDigits - 1] = {};
#pragma unroll
    for (int digit = 0; digit < kQueryDigits - 1; ++digit) sums[digit] = sum(digits[digit], key);
    dot += static_cast<float>(sums[0]);
    dot += 256.0f * static_cast<float>(256 * sums[2] + sums[1]);
  }
  // Of the lowest digit.
  template <class Memory>
  SSD_DEVICE static float lowest_products(const Memory& shared, int g, int32_t chunk, const Key& key) {
    return static_cast<float>(sum(shared.queries[g][0] + chunk * kWords, key)) / 256.0f;
  }

 private:
  SSD_DEVICE static int32_t sum(const uint32_t digit[kWords], const Key& key) {
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) sum = port::add_products(digit[i], key.bytes.words[i], sum);
    return sum;
  }
};

template <class T, int kDim, int kGroup>
struct Attention {
  using Shape = Geometry<T, kDim>;
  using Memory = Shared<T, kDim, kGroup>;
  using Chunk = ChunkOf<Shape::kBytes>;
  using Query = QueryChunk<T, Shape::kVector>;
  static constexpr int kVector = Shape::kVector, kCopies = Shape::kCopies, kDepth = Shape::kDepth;
  static constexpr bool kInt8 = std::is_same_v<T, Int8>;

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
  int32_t warp_tiles;   // of which this warp reads any token: in the last one it may have nothing to do
  // The first chunk that this lane reads of its first token.
  const char* lane_keys;
  const char* lane_values;
  const char* next = nullptr;  // and of the next tile to copy, up to tile run_end
  int32_t run_end = 0;

  SSD_DEVICE Attention(const CacheLayer& layer, const Item& item)
      : layer(layer),
        item(item),
        shape(layer.shape.head_dim),
        shared(*reinterpret_cast<Memory*>(port::shared_memory())),
        keys(static_cast<const T*>(layer.keys) + first_slot() * shape.dim()),
        values(static_cast<const T*>(layer.values) + first_slot() * shape.dim()),
        begin(item.part * kPartSlots),
        count(larger(smaller(item.total - begin, kPartSlots), 0)),
        appends(item.part == 0),
        gap(item.gap - begin),
        apart(item.view.apart - begin) {
    tiles = whole_tiles(count + tile_tokens() - 1);
    const int32_t before = (port::warp_index() * port::kWarp >> shape.lane_bits_) * kDepth;
    warp_tiles = port::shuffle(static_cast<int32_t>(whole_tiles(larger(count - before, 0) + tile_tokens() - 1)), 0);
    const int64_t first =
        static_cast<int64_t>(begin + slot_group() * kDepth) * shape.slot_bytes() + lane() * Shape::kBytes;
    lane_keys = port::whole(reinterpret_cast<const char*>(keys) + first);
    lane_values = port::whole(reinterpret_cast<const char*>(values) + first);
  }

  // What the row's own slots are counted from: beside the slab, if the first ones are in a shared prompt.
  SSD_DEVICE int64_t first_slot() const {
    return static_cast<int64_t>(item.row) * layer.shape.slots + item.offset - item.view.apart;
  }
  // And those of the shared prompt, in its own slab.
  SSD_DEVICE int64_t first_prompt_slot() const {
    return (static_cast<int64_t>(shared.prompt) * layer.shape.heads + item.head) * layer.shape.max_prompt;
  }

  // Bytes from the one to the other.
  SSD_DEVICE int64_t to_prompt(bool is_key) const {
    const char* prompt = static_cast<const char*>(is_key ? layer.prompt_keys : layer.prompt_values);
    return prompt + first_prompt_slot() * shape.slot_bytes() - reinterpret_cast<const char*>(is_key ? keys : values);
  }

  SSD_DEVICE int32_t lane() const { return port::thread_index() & (shape.lanes() - 1); }  // among those of its slot
  SSD_DEVICE int32_t slot_group() const { return port::thread_index() >> shape.lane_bits_; }
  SSD_DEVICE int32_t chunk(int copy) const { return lane() + copy * shape.lanes(); }
  SSD_DEVICE bool has_chunk(int copy) const { return kDim || chunk(copy) < shape.chunks(); }
  SSD_DEVICE int32_t tile_tokens() const { return shape.groups() * kDepth; }
  SSD_DEVICE int32_t whole_tiles(uint32_t tokens) const { return tokens * shape.lanes() / (kThreads * kDepth); }
  // The token of this part that this thread reads in a tile, maybe beyond the last.
  SSD_DEVICE int32_t token(int32_t tile, int depth) const {
    return tile * tile_tokens() + slot_group() * kDepth + depth;
  }
  // Of a slot's lanes, each has one logit in the end, or several have the same: then the first of them counts.
  SSD_DEVICE int32_t lanes_per_depth() const { return shape.lanes() / kDepth; }
  SSD_DEVICE int32_t own_token(int32_t tile) const { return token(tile, lane() / lanes_per_depth()); }
  SSD_DEVICE bool owns_token() const { return lane() % lanes_per_depth() == 0; }
  SSD_DEVICE Chunk& staged(int32_t tile, int depth, int copy) const {
    return shared.stages[(tile % kStages * kDepth + depth) * kCopies + copy][port::thread_index()];
  }

  // Starts to copy what this thread needs of a tile: of each in turn, keys' tiles coming before values'.
  SSD_DEVICE void copy_tile(int32_t index) {
    if (index == run_end && !start_run(index)) return;
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth)
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy)
        if (has_chunk(copy)) port::copy_async<Shape::kBytes>(&staged(index, depth, copy), next + chunk_at(depth, copy));
    next += tile_tokens() * shape.slot_bytes();
  }
  // Bytes from a lane's first chunk of a tile.
  SSD_DEVICE int32_t chunk_at(int depth, int copy) const {
    return depth * shape.slot_bytes() + copy * shape.lanes() * Shape::kBytes;
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
      next = from + further(first);
      return true;
    }
    if (tile >= warp_tiles) return false;
    if (until >= count)
      copy_slots(index, tile, from + further(first), [](int32_t) { return 0; });
    else
      copy_slots(index, tile, from, further);
    return false;
  }

  // Zeros arrive of tokens beyond the last, of which nothing is read.
  template <class Offset>
  SSD_DEVICE void copy_slots(int32_t index, int32_t tile, const char* from, Offset further) const {
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      const int32_t j = token(tile, depth);
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy)
        if (has_chunk(copy))
          port::copy_async<Shape::kBytes>(&staged(index, depth, copy), from + chunk_at(depth, copy) + further(j),
                                          j < count);
    }
  }
  // Always one group of copies.
  SSD_DEVICE void fetch(int32_t index) {
    copy_tile(index);
    port::commit_copies();
  }

  // Starts to copy the scales of the part's tokens, for the threads that will have their logits, and zeros beyond.
  SSD_DEVICE void fetch_scales() const {
    if (!owns_token()) return;
    const int64_t own = first_slot(), prompt = apart > 0 ? first_prompt_slot() : 0;
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; ++tile) {
      const int32_t j = own_token(tile);
      const bool is_apart = j < apart;
      const int64_t slot = is_apart ? prompt + begin + j : own + item.slot_of(begin + j);
      port::copy_async<4>(shared.logits[0] + j, (is_apart ? layer.prompt_key_scales : layer.key_scales) + slot,
                          j < count);
      port::copy_async<4>(shared.value_scales + j, (is_apart ? layer.prompt_value_scales : layer.value_scales) + slot,
                          j < count);
    }
  }

  // Whether queries have more bits than their upper digits.
  SSD_DEVICE bool is_fine() const { return layer.dtype == kFloat32; }

  SSD_DEVICE void load_queries(Query q[kGroup][kCopies]) const {
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy) q[g][copy].load(shared, g, chunk(copy), has_chunk(copy));
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
  SSD_DEVICE void attend_keys(const Query q[kGroup][kCopies]) {
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; ++tile) {
      port::wait_copies<kStages - 2>();
      fetch(tile + kStages - 1);
      if (tile >= warp_tiles) break;
      float dot[kGroup][kDepth] = {};
      if constexpr (kInt8)
        if (is_fine() && has_chunk(0)) {
#pragma unroll
          for (int depth = 0; depth < kDepth; ++depth) {
            const typename Query::Key key(staged(tile, depth, 0));
#pragma unroll
            for (int g = 0; g < kGroup; ++g) dot[g][depth] = Query::lowest_products(shared, g, chunk(0), key);
          }
        }
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth)
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy)
          if (has_chunk(copy)) {
            const typename Query::Key key(staged(tile, depth, copy));
#pragma unroll
            for (int g = 0; g < kGroup; ++g) q[g][copy].add_products(key, dot[g][depth]);
          }
      const int32_t j = own_token(tile);
      const bool is_there = owns_token() && j < count;
      float scale = 1.0f;
      if constexpr (kInt8) scale = is_there ? shared.logits[0][j] : 0.0f;
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        float logit = reduce(dot[g]);
        if constexpr (kInt8) logit *= scale * shared.query_scales[g];
        if (owns_token()) shared.logits[g][j] = is_there ? logit : -INFINITY;
      }
    }
    if (appends) attend_fresh(q);
  }

  // All lanes read the new token, and the block's first one keeps the logits.
  SSD_DEVICE void attend_fresh(const Query q[kGroup][kCopies]) const {
    float dot[kGroup][1] = {};
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy)
      if (has_chunk(copy)) {
        const typename Query::Key key(shared.fresh[0] + chunk(copy) * kVector);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if constexpr (kInt8)
            if (is_fine()) dot[g][0] = Query::lowest_products(shared, g, chunk(copy), key);
          q[g][copy].add_products(key, dot[g][0]);
        }
      }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float logit = dot[g][0];
      for (int mask = shape.lanes() / 2; mask > 0; mask /= 2) logit += port::shuffle_xor(logit, mask);
      if constexpr (kInt8) logit *= shared.fresh_scales[0] * shared.query_scales[g];
      if (port::thread_index() == 0) shared.logits[g][kNewToken] = logit;
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
      if (tile >= warp_tiles) break;
      float weight[kGroup][kDepth], scale[kDepth];
      if constexpr (kInt8) port::load_floats<kDepth>(shared.value_scales + token(tile, 0), scale);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        port::load_floats<kDepth>(shared.logits[g] + token(tile, 0), weight[g]);
#pragma unroll
        for (int depth = 0; depth < kDepth; ++depth) {
          weight[g][depth] = port::power_of_two(weight[g][depth] - highest[g]);
          if constexpr (kInt8) weight[g][depth] *= scale[depth];
        }
      }
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth)
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy) {
          if (!has_chunk(copy)) continue;
          float value[kVector];
          port::widen(staged(tiles + tile, depth, copy), value, T{});
#pragma unroll
          for (int g = 0; g < kGroup; ++g)
#pragma unroll
            for (int i = 0; i < kVector; ++i) acc[g][copy][i] += weight[g][depth] * value[i];
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
    if (appends) {
      const float weight = port::power_of_two(shared.logits[g][kNewToken] - highest);
      if constexpr (kInt8)
        total += weight * shared.fresh_scales[1] * static_cast<float>(shared.fresh[1][e]);
      else
        total += weight * shared.fresh[1][e];
    }
    return total;
  }
};

}  // namespace ssd::cuda
