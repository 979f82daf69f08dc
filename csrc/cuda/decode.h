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

// Shared memory of the decode kernel. kWidth: at least the head_dim. What is used after the attention lies where the
// stages were: sums, and behind them the arrays of ranking_bytes, whose length only the layer knows.
template <int kWidth, int kGroup>
struct Shared {
  float fresh[2][kWidth];         // key and value of the new token
  float queries[kGroup][kWidth];  // scaled
  float logits[kGroup][kTokens];  // in base 2
  float gains[kTokens];           // of the scores
  float scores[kTokens];          // before this step
  int32_t positions[kTokens];
  int32_t prompt_len, step;  // the cursor
  int32_t last;              // whether this is the last of the head's blocks
  int32_t moves;
  union {
    Chunk stages[kStages * kChunksPerStage][kThreads];
    float sums[kWarps][kGroup][kWidth];  // of values
  };
};

// int64 ranks, int32 lost, int32 lists: [largest + 1] each; then, of a split head, float maxima and norms [group] each.
SSD_INLINE int32_t ranking_bytes(int32_t largest, int32_t group) { return 16 * (largest + 1) + 8 * group; }

template <int kWidth, int kGroup>
SSD_INLINE int32_t shared_bytes(int32_t largest, int32_t group) {
  using Memory = Shared<kWidth, kGroup>;
  constexpr int32_t kAround = sizeof(Memory) - sizeof(Memory::stages);
  const int32_t after = static_cast<int32_t>(sizeof(Memory::sums)) + ranking_bytes(largest, group);
  return kAround + larger(after, static_cast<int32_t>(sizeof(Memory::stages)));
}

// Defined in decode_f32.cu, decode_bf16.cu and decode_f16.cu: one file per data type, for reading CUDA's headers takes
// as long as compiling a kernel for one architecture. kDim 0 takes the head_dim at run time.
template <class T, int kDim>
int start_decode(const DecodeParams& params, const Launch& launch, void* stream);
int start_prefill(const PrefillParams& params, const Launch& launch, void* stream);

// Both return 0 or an error of CUDA, which `error_text` explains. Nothing is read back, and nothing waits.
int decode(const DecodeParams& params, void* stream);
int prefill(const PrefillParams& params, void* stream);

const char* error_text(int error);

// Why no kernel can run here, or null.
const char* unavailable();

// Makes a device current for this thread's launches; 0 or an error. `before`: the one to go back to afterwards, which is
// `device` itself if the one that was current has no context yet.
int use_device(int device, int* before);

}  // namespace ssd::cuda
