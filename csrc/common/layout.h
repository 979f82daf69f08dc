// Where a layer's tokens live, shared by all compiled backends. The twin of ssd_kernels/layout.py, which explains it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SSD_ALWAYS_INLINE __host__ __device__ __forceinline__
#else
// Internal linkage and forced inlining: this header is compiled for several instruction sets into one library, and a
// shared weak symbol could carry the wrong one.
#define SSD_ALWAYS_INLINE inline __attribute__((always_inline))
#endif
#define SSD_INLINE static SSD_ALWAYS_INLINE

namespace ssd {

enum HeadKind : int32_t { kFull = 0, kWindow = 1, kHeavy = 2 };
enum ScoreRule : int32_t { kSum = 0, kMean = 1, kPosition = 2, kDecayed = 3 };
constexpr float kDecay = 0.96f;  // what every step keeps of kDecayed scores

// One row of the head table, int32 [heads, 8].
struct HeadRange {
  int32_t kind;
  int32_t offset;        // first slot in the slab
  int32_t capacity;      // slots, the prompt's included wherever it lies
  int32_t keep;          // W or M; INT32_MAX keeps everything
  int32_t recent;        // protected newest tokens of a heavy head
  int32_t rule;          // ScoreRule
  int32_t score_offset;  // first entry in scores and positions, or -1
  int32_t launch_order;  // the head to process at this rank, longest first
};

// int32 [batch, 2].
struct Cursor {
  int32_t prompt_len;
  int32_t step;  // visual tokens appended so far
};

// The layer's numbers that never change.
struct LayerShape {
  int32_t batch;
  int32_t heads;  // KV heads
  int32_t head_dim;
  int32_t slots;         // per batch row
  int32_t scored_slots;  // per batch row
  int32_t max_prompt;
  int32_t num_visual_tokens;
  int32_t row_buffer;
  bool keep_prompt;
  int32_t shared_prompts;  // prompts in a slab of their own; 0: every row has its own
  bool prompt_scores;      // whether kept prompt tokens have scores
};

SSD_INLINE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
SSD_INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// A contiguous run of slots, relative to the head's range.
struct Segment {
  int32_t begin;
  int32_t count;
};

// Slot arithmetic of one (batch row, head).
struct RowView {
  int32_t base;       // kept prompt: slots that are never evicted
  int32_t first;      // evictable prompt tokens
  int32_t step;       // visual tokens appended before this step
  int32_t period;     // steps between evictions, max(R, 1)
  int32_t since;      // steps since the last one
  int32_t evictable;  // evictable tokens held before this step
  int32_t ring;       // evictable slots
  int32_t apart;      // slots, the first ones, that are in the slab of shared prompts and not in the row's
  int32_t unscored;   // slots, the first ones, without score and position
};

// Slots of a head that are in the slab of shared prompts.
SSD_INLINE int32_t slots_apart(const LayerShape& shape) { return shape.shared_prompts ? shape.max_prompt : 0; }

// Evictable slots of a head.
SSD_INLINE int32_t ring_slots(const LayerShape& shape, int32_t capacity) {
  return capacity - (shape.keep_prompt ? shape.max_prompt : 0);
}

SSD_INLINE int32_t eviction_period(const LayerShape& shape) { return larger(shape.row_buffer, 1); }

// `since`: of the cursor's step, the same for all heads.
SSD_INLINE RowView row_view(const LayerShape& shape, int32_t keep, int32_t ring, Cursor cursor, int32_t since) {
  RowView view;
  view.base = shape.keep_prompt ? cursor.prompt_len : 0;
  view.first = cursor.prompt_len - view.base;
  view.step = cursor.step;
  view.period = eviction_period(shape);
  view.since = since;
  view.evictable = smaller(keep, view.first + view.step - since) + since;
  view.ring = ring;
  view.apart = shape.shared_prompts ? view.base : 0;
  view.unscored = shape.prompt_scores ? 0 : view.base;
  return view;
}

SSD_INLINE RowView row_view(const LayerShape& shape, const HeadRange& head, Cursor cursor) {
  return row_view(shape, head.keep, ring_slots(shape, head.capacity), cursor, cursor.step % eviction_period(shape));
}

// Slot of the token this step appends.
SSD_INLINE int32_t next_slot(const HeadRange& head, const RowView& view) {
  return view.base + (head.kind == kHeavy ? view.evictable : (view.first + view.step) % view.ring);
}

// Slots of the kept set and the new token, as at most three segments; returns how many.
SSD_INLINE int32_t live_segments(const HeadRange& head, const RowView& view, Segment segments[3]) {
  const int32_t count = view.evictable + 1;
  const int32_t end = view.first + view.step + 1;
  const int32_t begin = head.kind == kHeavy ? 0 : (end - count) % view.ring;
  if (begin == 0) {
    segments[0] = {0, view.base + count};
    return 1;
  }
  const int32_t unwrapped = smaller(count, view.ring - begin);
  int32_t used = 0;
  if (unwrapped == count) {
    if (view.base > 0) segments[used++] = {0, view.base};
  } else {
    // The wrapped part of the ring directly follows the prompt.
    segments[used++] = {0, view.base + count - unwrapped};
  }
  segments[used++] = {view.base + begin, unwrapped};
  return used;
}

// One head's row of the pin mask: visual token t is bit t % 32 of word t / 32.
struct PinMask {
  const int32_t* words;
  int32_t num_visual_tokens;
};

SSD_INLINE int32_t pin_words(const LayerShape& shape) {
  return shape.num_visual_tokens / 32 + (shape.num_visual_tokens % 32 != 0);
}

// `pinned`: int32 [heads, pin_words].
SSD_INLINE PinMask pin_mask(const LayerShape& shape, const int32_t* pinned, int32_t head) {
  return {pinned + static_cast<int64_t>(head) * pin_words(shape), shape.num_visual_tokens};
}

// Whether the token at `position` of a row is pinned: any two numbers may be given, and prompt tokens are not.
SSD_INLINE bool is_pinned(const PinMask& mask, int32_t position, int32_t prompt_len) {
  const uint32_t token = static_cast<uint32_t>(position) - static_cast<uint32_t>(prompt_len);
  return token < static_cast<uint32_t>(mask.num_visual_tokens) &&
         (static_cast<uint32_t>(mask.words[token / 32]) >> (token % 32) & 1u);
}

SSD_INLINE bool refresh_due(const RowView& view) { return view.since + 1 == view.period; }

// Whether the row reads one of the shared prompts, if there are any.
SSD_INLINE bool prompt_valid(const LayerShape& shape, const int32_t* prompt_of, int32_t row) {
  return shape.shared_prompts == 0 || (prompt_of[row] >= 0 && prompt_of[row] < shape.shared_prompts);
}

SSD_INLINE bool cursor_valid(const LayerShape& shape, Cursor cursor) {
  return cursor.prompt_len >= 0 && cursor.prompt_len <= shape.max_prompt && cursor.step >= 0 &&
         cursor.step < shape.num_visual_tokens;
}

// Whether a row of the head table lies inside the slab: the least that a kernel must know before it writes.
SSD_INLINE bool range_valid(const LayerShape& shape, const HeadRange& range) {
  const int32_t slots = range.capacity - slots_apart(shape);
  const int32_t scores = range.capacity - (shape.prompt_scores ? 0 : shape.max_prompt);
  const bool inside =
      slots >= 0 && slots <= shape.slots && range.offset >= 0 && range.offset <= shape.slots - slots && range.keep >= 0;
  const bool scored =
      range.score_offset >= 0 && scores <= shape.scored_slots && range.score_offset <= shape.scored_slots - scores;
  return inside && (scored || (range.score_offset == -1 && range.kind != kHeavy));
}

}  // namespace ssd
