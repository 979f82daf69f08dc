// The CUDA backend's entry points, and the plain structs its host side and its kernels share.
#pragma once

#include <cstdint>

#include "common/layer.h"
#include "cuda/types.h"

namespace ssd::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 4;               // asynchronous copies of kStages - 1 stages are under way
constexpr int kChunksPerStage = 4;       // of 16 bytes, per thread
constexpr int kPartSlots = 256;          // kept tokens that one block attends to
constexpr int kNewToken = kPartSlots;    // its index behind those
constexpr int kTokens = kPartSlots + 4;  // room for both
constexpr int kQueryDigits = 4;          // of 8 bits, for products with bytes
constexpr int kGroupBlock = 4;           // query heads that read a slot together
constexpr int kMaxHeadDim = 256;

// The cursor's bits from here up count blocks that are done with a row.
constexpr int kArrivalShift = 20;
constexpr int kMaxSteps = (1 << kArrivalShift) - 1;
constexpr int kMaxParts = (1 << (31 - kArrivalShift)) - 1;

// Divides 0 .. INT32_MAX: a multiplication by 2^shift / divisor, rounded up, and a shift are exact.
struct Divisor {
  uint32_t multiplier;
  int32_t shift;
};

// `by`: at least 1.
SSD_INLINE Divisor divisor(int32_t by) {
  int32_t shift = 31;
  while ((int64_t{1} << (shift - 31)) < by) ++shift;
  return {static_cast<uint32_t>(((uint64_t{1} << shift) + by - 1) / by), shift};
}
SSD_INLINE int32_t divide(int32_t n, Divisor by) {
  return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(n)} * by.multiplier >> by.shift);
}

// What the blocks of one rank serve, of each row: a head, or a part of a long one. int32 [12].
struct alignas(16) LaunchItem {
  int32_t head;
  int32_t part;  // of `parts`: the head's kept tokens [part * kPartSlots, (part + 1) * kPartSlots)
  int32_t parts;
  int32_t first_part;  // the rank of the head's first part
  // As in the head's row of the table. What may change there, `recent`, is copied from there.
  int32_t kind, offset, keep, rule, score_offset;
  int32_t ring;     // evictable slots
  Divisor by_ring;  // or by 1 if there are none
};

// What a launch needs besides the layer and the step. The first three pointers are null if no head is split over
// blocks; `items` if the host does not know the table: then blocks look for what they serve.
struct Workspace {
  float* partials;          // [batch, parts, group, head_dim + 2]: sums of values, maximum, norm
  float* logits;            // [batch, group, scored_slots]
  int32_t* arrivals;        // [batch, heads], zero between launches
  const LaunchItem* items;  // [parts]
  int32_t parts;            // at least the blocks that one row needs; `heads` if no head is split
  int32_t largest;          // at least the evictable tokens that any heavy head has room for
};

struct DecodeParams {
  CacheLayer layer;
  DecodeStep step;
  Workspace workspace;
  int32_t group;   // query heads per KV head
  Divisor period;  // between evictions
};

SSD_INLINE DecodeParams decode_params(const CacheLayer& layer, const DecodeStep& step, const Workspace& workspace) {
  return {layer, step, workspace, step.query_heads / layer.shape.heads, divisor(eviction_period(layer.shape))};
}

struct PrefillParams {
  CacheLayer layer;
  Prefill prompts;
};

// How a kernel is launched: a function of the layer's numbers and never of what the cache holds.
struct Launch {
  int32_t columns, rows;  // of blocks; those of a row start first
  int32_t threads;
  int32_t shared_bytes;
};

Launch decode_launch(const CacheLayer& layer, int32_t query_heads, const Workspace& workspace);
Launch prefill_launch(const LayerShape& shape, const Prefill& prompts);

// The launch items of a layer, [parts] of them, from its head table [heads]: all parts of a head side by side. The
// longest heads start first; or, alternating, the longest, the shortest, the second longest and so on, so that blocks
// which wait for memory share a multiprocessor with blocks at their beginning or end.
void list_items(const LayerShape& shape, const HeadRange* table, bool alternating, LaunchItem* items);

SSD_INLINE LaunchItem launch_item(const LayerShape& shape, const HeadRange& range, int32_t head, int32_t part,
                                  int32_t parts, int32_t first_part) {
  const int32_t ring = ring_slots(shape, range.capacity);
  return {head,
          part,
          parts,
          first_part,
          range.kind,
          range.offset,
          range.keep,
          range.rule,
          range.score_offset,
          ring,
          divisor(larger(ring, 1))};
}

// Blocks that attend to a head with room for `capacity` tokens. By slots, never by batch: batch invariance.
SSD_INLINE int32_t parts_of(int32_t capacity) { return larger(capacity + kPartSlots - 1, kPartSlots) / kPartSlots; }

// A row's step, as one thread of a block has read it.
struct alignas(16) Turn {
  Cursor cursor;
  int32_t since;    // the last eviction, in steps
  int32_t goes_on;  // whether there is a step left, and the cursor can be right
};

// How a block that serves any head_dim (kDim 0) lays out vectors: at least so many elements, and so many bytes a copy:
// 8 divide every vector of bytes.
template <int kDim>
constexpr int kWidthOf = kDim ? kDim : kMaxHeadDim;
template <class T, int kDim>
constexpr int kChunkBytes = kDim == 0 && sizeof(T) == 1 ? 8 : 16;

// The new token's key and value, and queries that are scaled to give logits in base 2.
template <class T, int kWidth, int kGroup>
struct StepVectors {
  float fresh[2][kWidth];
  float queries[kGroup][kWidth];
};
// In 8 bits: bytes, and queries as WarpVector::digits gives them, with the scales of both.
template <int kWidth, int kGroup>
struct alignas(16) StepVectors<Int8, kWidth, kGroup> {
  int8_t fresh[2][kWidth];
  uint32_t queries[kGroup][kQueryDigits][kWidth / 4];
  float value_scales[kPartSlots];  // of the part's tokens; those of keys lie where logits will
  float query_scales[kGroup];
  float fresh_scales[2];
};

// Shared memory of the decode kernel. What is used after the attention lies where the stages were: sums, and behind
// them the arrays of ranking_bytes, whose length only the layer knows.
template <class T, int kDim, int kGroup>
struct Shared : StepVectors<T, kWidthOf<kDim>, kGroup> {
  float logits[kGroup][kTokens];  // in base 2
  float scores[kTokens];          // before this step, then with what the tokens have gained
  int32_t positions[kTokens];
  Turn turn;
  int32_t prompt;  // the shared one that the row reads
  int32_t last;    // whether this is the last of the head's blocks
  int32_t moves;
  int32_t recent;  // of the head's row of the table
  union {
    ChunkOf<kChunkBytes<T, kDim>> stages[kStages * kChunksPerStage][kThreads];
    float sums[kWarps][kGroup][kWidthOf<kDim>];  // of values
  };
};

// Scratch of finding losers, csrc/cuda/evict.cuh DigitCounts.
constexpr int32_t kDigitBytes = 2 * kThreads * sizeof(int32_t);

// int64 ranks, int32 lists: [largest + 1] each; DigitCounts; then, of a split head, float maxima and norms [group]
// each.
SSD_INLINE int32_t ranking_bytes(int32_t largest, int32_t group) {
  return 12 * (largest + 1) + kDigitBytes + 8 * group;
}

// Blocks that are to share a multiprocessor of a compute capability (80 for 8.0), which bounds the registers of a
// thread: as many as shared memory has room for and ptxas serves without spills.
SSD_INLINE constexpr int32_t blocks_per_multiprocessor(int32_t capability, int32_t head_dim, int32_t group, bool int8) {
  const bool known = head_dim == 64 || head_dim == 128;
  if (capability < 90) return group == 1 ? 4 : int8 ? 2 : 3;
  return group == 1 ? (known ? 6 : 5) : known ? 4 : 3;
}

template <class T, int kDim, int kGroup>
SSD_INLINE int32_t shared_bytes(int32_t largest, int32_t group) {
  using Memory = Shared<T, kDim, kGroup>;
  constexpr int32_t kAround = sizeof(Memory) - sizeof(Memory::stages);
  const int32_t after = static_cast<int32_t>(sizeof(Memory::sums)) + ranking_bytes(largest, group);
  return kAround + larger(after, static_cast<int32_t>(sizeof(Memory::stages)));
}

// Defined in decode_f32.cu, decode_bf16.cu, decode_f16.cu and decode_i8.cu: one file per data type, for reading CUDA's
// headers takes as long as compiling a kernel for one architecture. kDim 0 takes the head_dim at run time.
template <class T, int kDim>
int start_decode(const DecodeParams& params, const Launch& launch, void* stream);
int start_prefill(const PrefillParams& params, const Launch& launch, void* stream);

// Both return 0 or an error of CUDA, which `error_text` explains. Nothing is read back, and nothing waits.
int decode(const DecodeParams& params, void* stream);
int prefill(const PrefillParams& params, void* stream);

const char* error_text(int error);

// Why no kernel can run here, or null.
const char* unavailable();

// Makes a device current for this thread's launches; 0 or an error. `before`: the one to go back to afterwards, which
// is `device` itself if the one that was current has no context yet.
int use_device(int device, int* before);

}  // namespace ssd::cuda
