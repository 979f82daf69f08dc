// The fused decode step of SPEC section 3: one block per (row, head), or per part of a long head. docs/cuda.md explains
// it.
//
// Keys and then values stream through shared memory in asynchronous 16-byte copies, several stages ahead of the
// arithmetic and without a pause between the two: while the logits are turned into probabilities, values are already
// under way. Every thread copies what it will read itself, so the stream needs no barriers. Logits, scores and ranks
// stay on chip, unless a head is split: then its last block finds the others' results in memory and finishes the step.
#pragma once

#include <cmath>

#include "cuda/decode.h"
#include "cuda/evict.cuh"
#include "cuda/item.cuh"
#include "cuda/port.cuh"

namespace ssd::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// How slots are shared out to lanes: `lanes` neighbouring lanes read one slot, 16 bytes each and kCopies times.
template <class T, int kDim>
struct Geometry {
  static constexpr int kVector = 16 / sizeof(T);  // elements of a chunk
  static constexpr int kCopies = kDim == 0 && sizeof(T) == 4 ? 2 : 1;
  static constexpr int kDepth = kChunksPerStage / kCopies;  // slots of a lane per stage
  int32_t dim_, lanes_;

  SSD_DEVICE explicit Geometry(int32_t head_dim) : dim_(head_dim), lanes_(1) {
    while (lanes_ * kCopies * kVector < head_dim) lanes_ *= 2;
  }
  SSD_DEVICE int32_t dim() const { return kDim ? kDim : dim_; }
  SSD_DEVICE int32_t lanes() const { return kDim ? kDim / kVector : lanes_; }
  SSD_DEVICE int32_t chunks() const { return dim() / kVector; }
  SSD_DEVICE int32_t groups() const { return kThreads / lanes(); }  // slots read at once by the block
};

template <class T, int kDim, int kGroup>
struct Decoder {
  using Shape = Geometry<T, kDim>;
  static constexpr int kVector = Shape::kVector, kCopies = Shape::kCopies, kDepth = Shape::kDepth;

  const DecodeParams& params;
  const Item& item;
  const Shape shape;
  const SharedLayout at;
  char* const shared;
  const T* keys;  // of the head's range
  const T* values;
  int32_t begin, count;  // this part's kept tokens
  bool appends;          // the head's first part has the new token, behind the others
  int32_t tiles;         // of keys; and as many of values

  SSD_DEVICE Decoder(const DecodeParams& params, const Item& item)
      : params(params),
        item(item),
        shape(params.layer.shape.head_dim),
        at(shared_layout(params.layer.shape.head_dim, kGroup, group(), params.workspace.largest)),
        shared(port::shared_memory()) {
    const int64_t first = (static_cast<int64_t>(item.row) * params.layer.shape.slots + item.range.offset) * shape.dim();
    keys = static_cast<const T*>(params.layer.keys) + first;
    values = static_cast<const T*>(params.layer.values) + first;
    begin = item.part * kPartSlots;
    count = larger(smaller(item.total - begin, kPartSlots), 0);
    appends = item.part == 0;
    const int32_t tile = shape.groups() * kDepth;
    tiles = (count + tile - 1) / tile;
  }

  SSD_DEVICE int32_t group() const { return params.step.query_heads / params.layer.shape.heads; }
  SSD_DEVICE bool scored() const { return item.range.score_offset >= 0; }
  SSD_DEVICE bool evicts() const {
    return item.range.kind == kHeavy && refresh_due(item.view) && item.view.evictable + 1 > item.range.keep;
  }
  SSD_DEVICE int64_t scored_at() const {
    return static_cast<int64_t>(item.row) * params.layer.shape.scored_slots + item.range.score_offset;
  }
  SSD_DEVICE float* floats(int32_t offset) const { return reinterpret_cast<float*>(shared + offset); }
  SSD_DEVICE int32_t* integers(int32_t offset) const { return reinterpret_cast<int32_t*>(shared + offset); }
  SSD_DEVICE float* logits(int g) const { return floats(at.logits) + g * kTokens; }

  SSD_DEVICE int32_t lane() const { return port::thread_index() % shape.lanes(); }  // among those of its slot
  SSD_DEVICE int32_t slot_group() const { return port::thread_index() / shape.lanes(); }
  SSD_DEVICE int32_t chunk(int copy) const { return lane() + copy * shape.lanes(); }
  // The token of this part that this thread reads in a tile, maybe beyond the last.
  SSD_DEVICE int32_t token(int32_t tile, int depth) const {
    return (tile * kDepth + depth) * shape.groups() + slot_group();
  }
  SSD_DEVICE Chunk* staged(int32_t tile, int depth, int copy) const {
    const int32_t place = (tile % kStages * kDepth + depth) * kCopies + copy;
    return reinterpret_cast<Chunk*>(shared) + place * kThreads + port::thread_index();
  }

  // Starts to copy what this thread needs of a tile, keys' tiles coming before values'. Always one group of copies.
  SSD_DEVICE void fetch(int32_t index) const {
    if (index < 2 * tiles) {
      const bool is_key = index < tiles;
      const T* slab = is_key ? keys : values;
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth) {
        const int32_t j = token(is_key ? index : index - tiles, depth);
        if (j >= count) continue;
        const T* slot = slab + static_cast<int64_t>(item.slot_of(begin + j)) * shape.dim();
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy)
          if (chunk(copy) < shape.chunks())
            port::copy16_async(staged(index, depth, copy), slot + chunk(copy) * kVector);
      }
    }
    port::commit_copies();
  }

  // Scores and, where they will be needed, positions of the part's tokens: for the threads that copy them.
  SSD_DEVICE void fetch_scores() const {
#pragma unroll 1
    for (int32_t j = port::thread_index(); j < count; j += kThreads) {
      const int64_t from = scored_at() + item.slot_of(j);
      port::copy4_async(floats(at.scores) + j, params.layer.scores + from);
      if (evicts()) port::copy4_async(integers(at.positions) + j, params.layer.positions + from);
    }
  }

  SSD_DEVICE static void widen(const Chunk& chunk, float to[kVector]) {
    T elements[kVector];
    memcpy(elements, &chunk, sizeof chunk);
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = port::to_float(elements[i]);
  }

  // Element e of a vector, turned to the new token's position if the step says so, and rounded as it is stored.
  SSD_DEVICE T element(const T* x, int32_t e) const {
    if (!params.step.cos) return x[e];
    const int32_t half = shape.dim() / 2;
    const bool first = e < half;
    const int32_t pair = first ? e : e - half;
    const int64_t angle = static_cast<int64_t>(item.position()) * half + pair;
    const float cos = params.step.cos[angle], sin = params.step.sin[angle];
    const float a = port::to_float(x[pair]), b = port::to_float(x[pair + half]);
    T turned;
    port::from_float(first ? a * cos - b * sin : b * cos + a * sin, &turned);
    return turned;
  }

  // Rule 1: the new token into its slot, and its key and value as floats into shared memory.
  SSD_DEVICE void append() const {
    const DecodeStep& step = params.step;
    const T* k = static_cast<const T*>(step.k) + item.row * step.k_row_stride + item.head * step.k_head_stride;
    const T* v = static_cast<const T*>(step.v) + item.row * step.v_row_stride + item.head * step.v_head_stride;
    const int64_t slot = static_cast<int64_t>(item.new_slot) * shape.dim();
#pragma unroll 1
    for (int32_t e = port::thread_index(); e < shape.dim(); e += kThreads) {
      const T key = element(k, e), value = v[e];
      const_cast<T*>(keys)[slot + e] = key;
      const_cast<T*>(values)[slot + e] = value;
      floats(at.fresh)[e] = port::to_float(key);
      floats(at.fresh)[shape.dim() + e] = port::to_float(value);
    }
  }

  // The queries from g0 on, scaled to give logits in base 2, as floats into shared memory.
  SSD_DEVICE void stage_queries(int32_t g0) const {
    const DecodeStep& step = params.step;
    const float scale = step.scale * kLog2E;
    const int32_t elements = smaller(group() - g0, kGroup) * shape.dim();
    const T* first =
        static_cast<const T*>(step.q) + item.row * step.q_row_stride + (item.head * group() + g0) * step.q_head_stride;
#pragma unroll 1
    for (int32_t i = port::thread_index(); i < kGroup * shape.dim(); i += kThreads) {
      const int32_t g = i / shape.dim();
      floats(at.queries)[i] =
          i < elements ? port::to_float(element(first + g * step.q_head_stride, i - g * shape.dim())) * scale : 0.0f;
    }
  }

  // This lane's elements of them.
  SSD_DEVICE void load_queries(float q[kGroup][kCopies][kVector]) const {
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy)
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          q[g][copy][i] =
              chunk(copy) < shape.chunks() ? floats(at.queries)[g * shape.dim() + chunk(copy) * kVector + i] : 0.0f;
  }

  // The part's logits [kGroup, count] into shared memory, the new token's behind them.
  SSD_DEVICE void attend_keys(const float q[kGroup][kCopies][kVector]) const {
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; ++tile) {
      port::wait_copies<kStages - 2>();
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth) {
        float dot[kGroup] = {};
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy) {
          if (chunk(copy) >= shape.chunks()) continue;
          float key[kVector];
          widen(*staged(tile, depth, copy), key);
#pragma unroll
          for (int g = 0; g < kGroup; ++g)
#pragma unroll
            for (int i = 0; i < kVector; ++i) dot[g] += q[g][copy][i] * key[i];
        }
        store_logits(dot, token(tile, depth), token(tile, depth) < count);
      }
      fetch(tile + kStages - 1);
    }
    if (appends) {
      // All lanes read it, and the block's first ones keep the result.
      float dot[kGroup] = {};
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy) {
        if (chunk(copy) >= shape.chunks()) continue;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float key = floats(at.fresh)[chunk(copy) * kVector + i];
#pragma unroll
          for (int g = 0; g < kGroup; ++g) dot[g] += q[g][copy][i] * key;
        }
      }
      store_logits(dot, count, slot_group() == 0);
    }
  }

  SSD_DEVICE void store_logits(float dot[kGroup], int32_t j, bool mine) const {
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
      for (int mask = shape.lanes() / 2; mask > 0; mask /= 2) dot[g] += port::shuffle_xor(dot[g], mask);
    if (mine && lane() == 0)
      for (int g = 0; g < kGroup; ++g) logits(g)[j] = dot[g];
  }

  // Maximum and sum of powers of the part's logits: by every warp for itself, which takes less than a barrier more.
  SSD_DEVICE void normalize(int32_t attended, float highest[kGroup], float norm[kGroup]) const {
    const int warp_lane = port::thread_index() % port::kWarp;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      highest[g] = -INFINITY;
#pragma unroll 1
      for (int32_t j = warp_lane; j < attended; j += port::kWarp) highest[g] = fmaxf(highest[g], logits(g)[j]);
      for (int mask = port::kWarp / 2; mask > 0; mask /= 2)
        highest[g] = fmaxf(highest[g], port::shuffle_xor(highest[g], mask));
      norm[g] = 0.0f;
#pragma unroll 1
      for (int32_t j = warp_lane; j < attended; j += port::kWarp)
        norm[g] += port::power_of_two(logits(g)[j] - highest[g]);
      for (int mask = port::kWarp / 2; mask > 0; mask /= 2) norm[g] += port::shuffle_xor(norm[g], mask);
    }
  }

  // This lane's elements of the sums of values [kGroup, head_dim], over its own slots.
  SSD_DEVICE void attend_values(const float highest[kGroup], float acc[kGroup][kCopies][kVector]) const {
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; ++tile) {
      port::wait_copies<kStages - 2>();
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth) {
        const int32_t j = token(tile, depth);
        if (j >= count) continue;
        float weight[kGroup];
#pragma unroll
        for (int g = 0; g < kGroup; ++g) weight[g] = port::power_of_two(logits(g)[j] - highest[g]);
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy) {
          if (chunk(copy) >= shape.chunks()) continue;
          float value[kVector];
          widen(*staged(tiles + tile, depth, copy), value);
#pragma unroll
          for (int g = 0; g < kGroup; ++g)
#pragma unroll
            for (int i = 0; i < kVector; ++i) acc[g][copy][i] += weight[g] * value[i];
        }
      }
      fetch(tiles + tile + kStages - 1);
    }
  }

  // Adds up the block's sums of values: each warp's in shared memory, [kWarps, kGroup, head_dim].
  SSD_DEVICE void share_sums(float acc[kGroup][kCopies][kVector]) const {
    const int warp = port::thread_index() / port::kWarp, warp_lane = port::thread_index() % port::kWarp;
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy) {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          for (int mask = shape.lanes(); mask < port::kWarp; mask *= 2)
            acc[g][copy][i] += port::shuffle_xor(acc[g][copy][i], mask);
        if (warp_lane >= shape.lanes() || chunk(copy) >= shape.chunks()) continue;
        float* to = floats(at.sums) + (warp * kGroup + g) * shape.dim() + chunk(copy) * kVector;
#pragma unroll
        for (int i = 0; i < kVector; ++i) to[i] = acc[g][copy][i];
      }
  }

  // Sum of values of one element, all warps' and the new token's.
  SSD_DEVICE float sum(int g, int32_t e, float highest) const {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += floats(at.sums)[(warp * kGroup + g) * shape.dim() + e];
    if (appends) total += port::power_of_two(logits(g)[count] - highest) * floats(at.fresh)[shape.dim() + e];
    return total;
  }

  SSD_DEVICE T* output(int32_t g) const {
    const int32_t head = item.head * group() + g;
    return static_cast<T*>(params.step.out) +
           (static_cast<int64_t>(item.row) * params.step.query_heads + head) * shape.dim();
  }

  // What a split head's part hands over for a query head: [head_dim] sums, maximum, norm.
  SSD_DEVICE float* partial(int32_t part, int32_t g) const {
    const int64_t index = static_cast<int64_t>(item.row) * params.workspace.parts + item.first_part + part;
    return params.workspace.partials + (index * group() + g) * (shape.dim() + 2);
  }
  SSD_DEVICE float* split_logits(int32_t g) const {
    const int64_t index = static_cast<int64_t>(item.row) * group() + g;
    return params.workspace.logits + index * params.layer.shape.scored_slots + item.range.score_offset;
  }

  // Query heads g0 .. of the group: their output, or this part's share of it.
  SSD_DEVICE void attend(int32_t g0) const {
    float q[kGroup][kCopies][kVector];
    load_queries(q);
    attend_keys(q);
    port::sync_block();
    const int32_t attended = count + appends;
    const int32_t members = smaller(group() - g0, kGroup);
    float highest[kGroup], norm[kGroup];
    normalize(attended, highest, norm);
    if (scored()) {
#pragma unroll 1
      for (int32_t j = port::thread_index(); j < attended; j += kThreads) {
        if (item.parts > 1) {
          const int32_t slot = j < count ? item.slot_of(begin + j) : item.new_slot;
#pragma unroll 1
          for (int g = 0; g < members; ++g) split_logits(g0 + g)[slot] = logits(g)[j];
          continue;
        }
        float gain = g0 == 0 ? 0.0f : floats(at.gains)[j];
#pragma unroll
        for (int g = 0; g < kGroup; ++g)
          if (g < members) gain += port::power_of_two(logits(g)[j] - highest[g]) / norm[g];
        floats(at.gains)[j] = gain;
      }
    }
    float acc[kGroup][kCopies][kVector] = {};
    attend_values(highest, acc);
    port::sync_block();  // all have read their stages
    share_sums(acc);
    port::sync_block();
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (g >= members) continue;
      float* split = item.parts > 1 ? partial(item.part, g0 + g) : nullptr;
#pragma unroll 1
      for (int32_t e = port::thread_index(); e < shape.dim(); e += kThreads) {
        const float total = sum(g, e, highest[g]);
        if (split)
          split[e] = total;
        else
          port::from_float(total / norm[g], output(g0 + g) + e);
      }
      if (split && port::thread_index() == 0) {
        split[shape.dim()] = highest[g];
        split[shape.dim() + 1] = norm[g];
      }
    }
  }

  // Whether this block is the last of its head's to come here; then it sees what the others have written.
  SSD_DEVICE bool last_part() const {
    port::fence();
    port::sync_block();
    if (port::thread_index() == 0) {
      int32_t* arrivals = params.workspace.arrivals + item.row * params.layer.shape.heads + item.head;
      const bool last = port::atomic_add(arrivals, 1) == item.parts - 1;
      if (last) *arrivals = 0;
      integers(at.flags)[2] = last;
    }
    port::sync_block();
    port::fence();
    return integers(at.flags)[2];
  }

  // A split head's output from its parts, which are combined in order; leaves [group] maxima and norms.
  SSD_DEVICE void combine() const {
    float* maxima = floats(at.norms);
    float* norms = maxima + group();
    const int32_t parts = larger((item.total + kPartSlots - 1) / kPartSlots, 1);  // those that held a token
    const int32_t dim = shape.dim();
#pragma unroll 1
    for (int32_t g = 0; g < group(); ++g) {
      float highest = -INFINITY, norm = 0.0f;
#pragma unroll 1
      for (int32_t part = 0; part < parts; ++part)
        highest = fmaxf(highest, port::load_shared_by_blocks(partial(part, g) + dim));
#pragma unroll 1
      for (int32_t part = 0; part < parts; ++part)
        norm += port::load_shared_by_blocks(partial(part, g) + dim + 1) *
                port::power_of_two(port::load_shared_by_blocks(partial(part, g) + dim) - highest);
#pragma unroll 1
      for (int32_t e = port::thread_index(); e < dim; e += kThreads) {
        float total = 0.0f;
#pragma unroll 1
        for (int32_t part = 0; part < parts; ++part)
          total += port::load_shared_by_blocks(partial(part, g) + e) *
                   port::power_of_two(port::load_shared_by_blocks(partial(part, g) + dim) - highest);
        port::from_float(total / norm, output(g) + e);
      }
      if (port::thread_index() == 0) {
        maxima[g] = highest;
        norms[g] = norm;
      }
    }
    port::sync_block();
  }

  // Rules 3 and 4, by the one block that knows the whole head.
  SSD_DEVICE void score_and_evict() const {
    const bool split = item.parts > 1;
    const bool evicting = evicts();
    float* scores = params.layer.scores + scored_at();
    int32_t* positions = params.layer.positions + scored_at();
    int64_t* ranks = reinterpret_cast<int64_t*>(shared + at.ranks);
    const PinMask pinned = pin_mask(params.layer.shape, params.layer.pinned, item.head);
#pragma unroll 1
    for (int32_t j = port::thread_index(); j <= item.total; j += kThreads) {
      const bool is_new = j == item.total;
      const int32_t slot = is_new ? item.new_slot : item.slot_of(j);
      float score = is_new ? 0.0f : split ? scores[slot] : floats(at.scores)[j];
      if (split) {
        const float* maxima = floats(at.norms);
#pragma unroll 1
        for (int32_t g = 0; g < group(); ++g)
          score +=
              port::power_of_two(port::load_shared_by_blocks(split_logits(g) + slot) - maxima[g]) / maxima[group() + g];
      } else {
        score += floats(at.gains)[j];
      }
      scores[slot] = score;
      if (is_new) positions[slot] = item.position();
      if (evicting && j >= item.view.base) {
        const int32_t position = is_new ? item.position() : split ? positions[slot] : integers(at.positions)[j];
        ranks[j - item.view.base] =
            token_rank(item.range, score, position, item.prompt_len, item.view.step + 1, pinned);
      }
    }
    if (!evicting) return;
    port::sync_block();
    const int64_t first = static_cast<int64_t>(item.view.base) * shape.dim();
    const Evictable<T> head{const_cast<T*>(keys) + first, const_cast<T*>(values) + first, scores + item.view.base,
                            positions + item.view.base};
    evict(head, item.view.evictable + 1, item.range.keep, shape.dim(), ranks, integers(at.lost), integers(at.lists),
          integers(at.flags) + 3);
  }

  SSD_DEVICE void run() const {
    if (scored() && item.parts == 1) fetch_scores();
#pragma unroll 1
    for (int32_t g0 = 0; g0 < group(); g0 += kGroup) {
      if (g0 > 0) port::sync_block();  // the sums lie where the stages were
#pragma unroll
      for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);
      if (g0 == 0 && appends) append();
      stage_queries(g0);
      port::sync_block();
      attend(g0);
      port::wait_copies<0>();
    }
    if (item.parts > 1) {
      if (!last_part()) return;
      combine();
    }
    if (scored()) score_and_evict();
  }

  // The whole output of a row or head that cannot be stepped.
  SSD_DEVICE static void clear(const DecodeParams& params, const Item& item) {
    const int32_t vectors = params.step.query_heads / params.layer.shape.heads;
    const int64_t first = static_cast<int64_t>(item.row) * params.step.query_heads + item.head * vectors;
    T* out = static_cast<T*>(params.step.out) + first * params.layer.shape.head_dim;
#pragma unroll 1
    for (int32_t e = port::thread_index(); e < vectors * params.layer.shape.head_dim; e += kThreads)
      port::from_float(0.0f, out + e);
  }
};

template <class T, int kDim, int kGroup>
SSD_KERNEL(kThreads, kGroup == 1 ? 4 : 3)
decode_kernel(const DecodeParams params) {
  Item item;
  const int32_t batch = params.layer.shape.batch;
  item.row = port::block_index() % batch;
  if (!find_head(params, port::block_index() / batch, item)) return;
  // One thread reads the cursor, for the row's other blocks count in it, and all of this block must see the same.
  const int32_t group = params.step.query_heads / params.layer.shape.heads;
  const SharedLayout at = shared_layout(params.layer.shape.head_dim, kGroup, group, params.workspace.largest);
  int32_t* shared_cursor = reinterpret_cast<int32_t*>(port::shared_memory() + at.flags);
  Cursor* cursors = params.layer.cursors + item.row;
  if (port::thread_index() == 0) {
    shared_cursor[0] = port::load_shared_by_blocks(&cursors->prompt_len);
    shared_cursor[1] = port::load_shared_by_blocks(&cursors->step);
  }
  port::sync_block();
  const Cursor cursor{shared_cursor[0], shared_cursor[1]};
  if (!locate(params, cursor, item)) {
    if (item.part == 0) Decoder<T, kDim, kGroup>::clear(params, item);
    return;
  }
  Decoder<T, kDim, kGroup>(params, item).run();
  // The row's last block takes it a step further, and the count with it.
  if (port::thread_index() == 0 &&
      (port::atomic_add(&cursors->step, 1 << kArrivalShift) >> kArrivalShift) == item.row_parts - 1)
    cursors->step = item.view.step + 1;
}

template <class T, int kDim>
int start_decode(const DecodeParams& params, const Launch& launch, void* stream) {
  const bool alone = params.step.query_heads == params.layer.shape.heads;
  return port::launch(alone ? decode_kernel<T, kDim, 1> : decode_kernel<T, kDim, kGroupBlock>, launch.blocks,
                      launch.threads, launch.shared_bytes, stream, params);
}

}  // namespace ssd::cuda
