// Rule 4 of docs/specification.md for one head by one block: which tokens lose, and winners into the losers' slots.
#pragma once

#include <type_traits>

#include "common/evict.h"
#include "cuda/decode.h"
#include "cuda/port.cuh"

namespace ssd::cuda {

// A token's place in the order of losing; `steps` counts this one.
SSD_DEVICE int64_t token_rank(int32_t rule, int32_t recent, float score, int32_t position, int32_t prompt_len,
                              int32_t steps, const PinMask& pinned) {
  if (position >= prompt_len + steps - recent) return kProtected;
  if (is_pinned(pinned, position, prompt_len)) return pinned_rank(position);
  if (rule == kPosition) return position;
  if (rule == kMean) score /= static_cast<float>(attended_steps(position, prompt_len, steps));
  return eviction_rank(score, position);
}

// Whether rank a of index i loses before rank b of index j. Ranks of different tokens differ unless memory is damaged.
SSD_DEVICE bool loses_before(int64_t a, int32_t i, int64_t b, int32_t j) { return a < b || (a == b && i < j); }

// The last of some losers in the order of losing: it loses, and all that lose before it.
struct LastLoser {
  int64_t rank;
  int32_t index;

  SSD_DEVICE bool loses(int64_t other, int32_t other_index) const {
    return !loses_before(rank, index, other, other_index);
  }
};

// How many candidates have a digit, by warp. Two of them by turns, so that one barrier a digit is enough.
struct DigitCounts {
  int32_t of[2][kWarps][port::kWarp];
};

// The losers-th of ranks [count] in the order of losing. From the highest digit of the ranks to the lowest, of the
// indices if ranks are equal, and no further than needed: each lane counts the candidates whose digit is its number,
// and those with the digit that decides stay candidates. All threads of the block call it, after a barrier.
SSD_DEVICE LastLoser last_loser(const int64_t* ranks, int32_t count, int32_t losers, DigitCounts* counts) {
  constexpr int kBits = 5;  // of a digit: as many numbers as lanes
  constexpr uint64_t kSign = uint64_t{1} << 63;
  const int lane = port::lane_index(), warp = port::warp_index();
  // What all candidates share: these bits, where the mask has ones.
  uint64_t prefix = 0, mask = 0;
  uint32_t index_prefix = 0, index_mask = 0;
  bool by_index = false;
  int32_t left = losers;  // how many of the candidates lose
  int turn = 0;
#pragma unroll 1
  for (int shift = 64 - kBits;;) {
    int32_t mine = 0;
#pragma unroll 1
    for (int32_t first = warp * port::kWarp; first < count; first += kThreads) {
      const int32_t i = first + lane;
      const uint64_t rank = i < count ? static_cast<uint64_t>(ranks[i]) ^ kSign : 0;  // negative ranks come first
      const uint32_t digit = static_cast<uint32_t>((by_index ? static_cast<uint64_t>(i) : rank) >> shift);
      uint32_t members =
          port::ballot(i < count && ((rank ^ prefix) & mask) == 0 && ((i ^ index_prefix) & index_mask) == 0);
#pragma unroll
      for (int bit = 0; bit < kBits; ++bit) members &= port::ballot(digit >> bit & 1) ^ (lane >> bit & 1 ? 0u : ~0u);
      mine += port::count_bits(members);
    }
    counts->of[turn][warp][lane] = mine;
    port::sync_block();
    int32_t all = 0;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) all += counts->of[turn][other][lane];
    turn ^= 1;
    int32_t until = all;  // candidates with this digit or a lower one
#pragma unroll
    for (int by = 1; by < port::kWarp; by *= 2) {
      const int32_t lower = port::shuffle_up(until, by);
      if (lane >= by) until += lower;
    }
    const uint32_t digit = port::first_bit(port::ballot(until >= left));
    const int32_t members = port::shuffle(all, digit);
    left -= port::shuffle(until - all, digit);
    if (by_index) {
      index_prefix = (index_prefix & index_mask) | digit << shift;
      index_mask = ~0u << shift;
    } else {
      prefix = (prefix & mask) | static_cast<uint64_t>(digit) << shift;
      mask = ~uint64_t{0} << shift;
    }
    if (members == left) break;  // all that share these digits lose
    if (shift == 0) by_index = true;
    shift = shift > 0 ? larger(shift - kBits, 0) : 32 - kBits;
  }
  return {static_cast<int64_t>((prefix | ~mask) ^ kSign),
          static_cast<int32_t>((index_prefix | ~index_mask) & INT32_MAX)};
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
  float* key_scales;  // of bytes
  float* value_scales;
};

// Overwrites the losers among the first `keep` slots with the winners beyond them. ranks [count] are in shared memory;
// lists [count], counts and moves [1] are scratch there. All threads of the block call it, after a barrier.
template <class T>
SSD_DEVICE void evict(const Evictable<T>& head, int32_t count, int32_t keep, int32_t head_dim, const int64_t* ranks,
                      int32_t* lists, DigitCounts* counts, int32_t* moves) {
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
    const LastLoser last = last_loser(ranks, count, losers, counts);
    if (warp < 2) {  // one lists losers among the first slots, the other winners beyond them
      const bool lose = warp == 0;
      const int32_t end = lose ? keep : count;
      int32_t* list = lose ? losers_at : winners_at;
      int32_t length = 0;
#pragma unroll 1
      for (int32_t first = lose ? 0 : keep; first < end; first += port::kWarp) {
        const int32_t i = first + lane;
        length = append_voters(i < end && last.loses(ranks[i], i) == lose, i, list, length);
      }
      if (warp == 0 && lane == 0) *moves = length;
    }
  }
  port::sync_block();
  constexpr bool kInt8 = std::is_same_v<T, Int8>;
  using Chunk = ChunkOf<kInt8 ? 8 : 16>;  // as divides a vector
  const int32_t chunks = head_dim * static_cast<int32_t>(sizeof(T)) / sizeof(Chunk);
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
    float key_scale = 0.0f, value_scale = 0.0f;
    if constexpr (kInt8) {
      key_scale = port::load_shared_by_blocks(head.key_scales + from);
      value_scale = port::load_shared_by_blocks(head.value_scales + from);
    }
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
      if constexpr (kInt8) {
        head.key_scales[to] = key_scale;
        head.value_scales[to] = value_scale;
      }
    }
  }
}

}  // namespace ssd::cuda
