// Rule 4 of docs/specification.md for one head by one block: which tokens lose, and winners into the losers' slots.
#pragma once

#include "common/evict.h"
#include "cuda/decode.h"
#include "cuda/port.cuh"

namespace ssd::cuda {

// A token's place in the order of losing; `steps` counts this one.
SSD_DEVICE int64_t token_rank(const HeadRange& range, float score, int32_t position, int32_t prompt_len, int32_t steps,
                              const PinMask& pinned) {
  if (position >= prompt_len + steps - range.recent) return kProtected;
  if (is_pinned(pinned, position, prompt_len)) return pinned_rank(position);
  if (range.rule == kPosition) return position;
  if (range.rule == kMean) score /= static_cast<float>(attended_steps(position, prompt_len, steps));
  return eviction_rank(score, position);
}

// Whether rank a of index i loses before rank b of index j. Ranks of different tokens differ unless memory is damaged.
SSD_DEVICE bool loses_before(int64_t a, int32_t i, int64_t b, int32_t j) { return a < b || (a == b && i < j); }

// Marks the `losers` lowest of ranks [count] in `lost`. Every token counts those below it: no order is built, and as
// many operations as threads can share; a refresh comes once in R steps.
SSD_DEVICE void mark_losers(const int64_t* ranks, int32_t count, int32_t losers, int32_t* lost) {
#pragma unroll 1
  for (int32_t i = port::thread_index(); i < count; i += kThreads) {
    const int64_t rank = ranks[i];
    int32_t below = 0;
    for (int32_t j = 0; j < count; ++j) below += loses_before(ranks[j], j, rank, i);
    lost[i] = below < losers;
  }
}

// The index of the lowest of ranks [count], for all lanes of the warp that calls it.
SSD_DEVICE int32_t lowest(const int64_t* ranks, int32_t count) {
  int64_t least = INT64_MAX;
  int32_t at = INT32_MAX;
#pragma unroll 1
  for (int32_t i = port::lane_index(); i < count; i += port::kWarp) {
    if (!loses_before(ranks[i], i, least, at)) continue;
    least = ranks[i];
    at = i;
  }
  for (int mask = port::kWarp / 2; mask > 0; mask /= 2) {
    const int64_t other = port::shuffle_xor(least, mask);
    const int32_t other_at = port::shuffle_xor(at, mask);
    if (!loses_before(other, other_at, least, at)) continue;
    least = other;
    at = other_at;
  }
  return at;
}

// Appends to `list`, in order of index and for all lanes alike, the indices of lanes that vote; returns the new length.
SSD_DEVICE int32_t append_voters(bool vote, int32_t index, int32_t* list, int32_t length) {
  const uint32_t votes = port::ballot(vote);
  const int lane = port::lane_index();
  if (vote) list[length + port::count_bits(votes & ((1u << lane) - 1))] = index;
  return length + port::count_bits(votes);
}

// A heavy head's slabs, from its first evictable slot.
template <class T>
struct Evictable {
  T* keys;
  T* values;
  float* scores;
  int32_t* positions;
};

// Overwrites the losers among the first `keep` slots with the winners beyond them. ranks [count] are in shared memory;
// lost [count], lists [count] and moves [1] are scratch there. All threads of the block call it, after a barrier.
template <class T>
SSD_DEVICE void evict(const Evictable<T>& head, int32_t count, int32_t keep, int32_t head_dim, const int64_t* ranks,
                      int32_t* lost, int32_t* lists, int32_t* moves) {
  const int warp = port::warp_index(), lane = port::lane_index();
  const int32_t losers = count - keep;
  int32_t* winners_at = lists;  // and as many losers: together at most `count`
  int32_t* losers_at = lists + smaller(losers, keep);
  if (losers == 1) {
    if (warp == 0) {
      const int32_t loser = lowest(ranks, count);
      if (lane == 0) {
        *moves = loser < keep;
        if (loser < keep) {
          winners_at[0] = keep;
          losers_at[0] = loser;
        }
      }
    }
  } else {
    mark_losers(ranks, count, losers, lost);
    port::sync_block();
    if (warp == 0) {
      int32_t leaving = 0, staying = 0;
#pragma unroll 1
      for (int32_t first = 0; first < count; first += port::kWarp) {
        const int32_t i = first + lane;
        const bool leaves = i < count && lost[i];
        leaving = append_voters(i < keep && leaves, i, losers_at, leaving);
        staying = append_voters(i >= keep && i < count && !leaves, i, winners_at, staying);
      }
      if (lane == 0) *moves = leaving;
    }
  }
  port::sync_block();
  const int32_t chunks = head_dim * static_cast<int32_t>(sizeof(T)) / 16;
#pragma unroll 1
  for (int32_t move = warp; move < *moves; move += kWarps) {
    const int32_t from = winners_at[move], to = losers_at[move];
    const Chunk* key = reinterpret_cast<const Chunk*>(head.keys + static_cast<int64_t>(from) * head_dim);
    const Chunk* value = reinterpret_cast<const Chunk*>(head.values + static_cast<int64_t>(from) * head_dim);
    Chunk* to_key = reinterpret_cast<Chunk*>(head.keys + static_cast<int64_t>(to) * head_dim);
    Chunk* to_value = reinterpret_cast<Chunk*>(head.values + static_cast<int64_t>(to) * head_dim);
    // All loads before the first store: the compiler cannot know that the slots differ.
    const float score = port::load_shared_by_blocks(head.scores + from);
    const int32_t position = port::load_shared_by_blocks(head.positions + from);
#pragma unroll 1
    for (int32_t chunk = lane; chunk < chunks; chunk += port::kWarp) {
      const Chunk moved_key = port::load_shared_by_blocks(key + chunk);
      const Chunk moved_value = port::load_shared_by_blocks(value + chunk);
      to_key[chunk] = moved_key;
      to_value[chunk] = moved_value;
    }
    if (lane == 0) {
      head.scores[to] = score;
      head.positions[to] = position;
    }
  }
}

}  // namespace ssd::cuda
