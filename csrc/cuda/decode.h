// The CUDA backend's entry points, and the plain structs its host side and its kernels share.
#pragma once

#include <cstdint>

#include "common/layer.h"

namespace ssd::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 4;               // asynchronous copies of kStages - 1 stages are under way
constexpr int kChunksPerStage = 4;       // of 16 bytes, per thread
constexpr int kPartSlots = 256;          // kept tokens that one block attends to
constexpr int kTokens = kPartSlots + 4;  // room for those and the new token
constexpr int kGroupBlock = 4;           // query heads that read a slot together
constexpr int kMaxHeadDim = 256;

// The cursor's bits from here up count blocks that are done with a row.
constexpr int kArrivalShift = 20;
constexpr int kMaxSteps = (1 << kArrivalShift) - 1;
constexpr int kMaxParts = (1 << (31 - kArrivalShift)) - 1;

// What a launch needs besides the layer and the step. The pointers are null if no head is split over blocks.
struct Workspace {
  float* partials;    // [batch, parts, group, head_dim + 2]: sums of values, maximum, norm
  float* logits;      // [batch, group, scored_slots]
  int32_t* arrivals;  // [batch, heads], zero between launches
  int32_t parts;      // at least the blocks that one row needs; `heads` if no head is split
  int32_t largest;    // at least the evictable tokens that any heavy head has room for
};

struct DecodeParams {
  CacheLayer layer;
  DecodeStep step;
  Workspace workspace;
};

struct PrefillParams {
  CacheLayer layer;
  Prefill prompts;
};

// How a kernel is launched: a function of the layer's numbers and never of what the cache holds.
struct Launch {
  int32_t blocks;
  int32_t threads;
  int32_t shared_bytes;
};

Launch decode_launch(const LayerShape& shape, int32_t query_heads, const Workspace& workspace);
Launch prefill_launch(const LayerShape& shape, const Prefill& prompts);

// Blocks that attend to a head with room for `capacity` tokens. By slots, never by batch: batch invariance.
SSD_INLINE int32_t parts_of(int32_t capacity) { return larger(capacity + kPartSlots - 1, kPartSlots) / kPartSlots; }

// Shared memory of the decode kernel, in bytes from its start. What is used after the attention lies where the stages
// were.
struct SharedLayout {
  int32_t sums;       // float [kWarps, group_block, head_dim]
  int32_t ranks;      // int64 [largest + 1]
  int32_t lost;       // int32 [largest + 1]
  int32_t lists;      // int32 [largest + 1]
  int32_t logits;     // float [group_block, kTokens]
  int32_t gains;      // float [kTokens]
  int32_t scores;     // float [kTokens]
  int32_t positions;  // int32 [kTokens]
  int32_t fresh;      // float [2, head_dim]
  int32_t queries;    // float [group_block, head_dim]
  int32_t norms;      // float [2, group]
  int32_t flags;      // int32 [4]: the cursor, whether this is a head's last part, moves
  int32_t bytes;
};

SSD_INLINE SharedLayout shared_layout(int32_t head_dim, int32_t group_block, int32_t group, int32_t largest) {
  constexpr int32_t kStageBytes = kStages * kThreads * kChunksPerStage * 16;
  SharedLayout at;
  at.sums = 0;
  at.ranks = kWarps * group_block * head_dim * 4;
  at.lost = at.ranks + 8 * (largest + 1);
  at.lists = at.lost + 4 * (largest + 1);
  at.logits = (larger(at.lists + 4 * (largest + 1), kStageBytes) + 15) / 16 * 16;
  at.gains = at.logits + group_block * kTokens * 4;
  at.scores = at.gains + kTokens * 4;
  at.positions = at.scores + kTokens * 4;
  at.fresh = at.positions + kTokens * 4;
  at.queries = at.fresh + 2 * head_dim * 4;
  at.norms = at.queries + group_block * head_dim * 4;
  at.flags = at.norms + 2 * group * 4;
  at.bytes = at.flags + 16;
  return at;
}

struct BFloat16;
struct Float16;

// Each defined in a file of its own, decode_*.cu, for float, BFloat16 and Float16. kDim 0 takes the head_dim at run
// time.
template <class T, int kDim>
int start_decode(const DecodeParams& params, const Launch& launch, void* stream);
int start_prefill(const PrefillParams& params, const Launch& launch, void* stream);

// Both return 0 or an error of CUDA, which `error_text` explains. Nothing is read back, and nothing waits.
int decode(const DecodeParams& params, void* stream);
int prefill(const PrefillParams& params, void* stream);

const char* error_text(int error);

// Why no kernel can run here, or null.
const char* unavailable();

// Makes a device current for this thread's launches; 0 or an error.
int use_device(int device);

}  // namespace ssd::cuda
