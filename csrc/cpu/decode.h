// The CPU backend's entry points and what its kernels share with their dispatcher.
#pragma once

#include <cstdint>

#include "common/layer.h"

namespace ssd {

constexpr int kMaxHeadDim = 256;

// Counts are padded to whole vectors of the widest instruction set.
SSD_INLINE int32_t padded(int32_t count) { return (count + 15) / 16 * 16; }

// What a query takes with all that kernels prepare of it.
SSD_INLINE int32_t query_floats(int32_t head_dim) { return (head_dim + 63) / 64 * 64 + 80; }

// One thread's working memory.
struct Scratch {
  float* q;        // [group, query_floats(head_dim)], scaled
  float* acc;      // [group, head_dim]
  float* unit;     // [group], what dot products with q are multiples of
  float* inverse;  // [group], 1 / softmax denominators
  float* logits;   // [group, padded(longest kept set)]
  float* tile;     // [16, head_dim]
  float* rotated;  // [head_dim], a key
  int64_t* ranks;  // [2, longest kept set]
};

// The items [begin, end) of a layer's (row, head) pairs. Row by row, heads in the order of their slots, a thread reads
// the slabs from front to back, as hardware prefetchers like it: item i is head i % heads of row i / heads. Head by
// head, longest first, few rows are shared out evenly: item i is row i % batch of the head of launch rank i / batch.
struct Items {
  int64_t begin;
  int64_t end;
  bool row_by_row;
};

// Steps the items; and the largest of some floats, read in several places at once.
namespace portable {
void decode_items(const CacheLayer&, const DecodeStep&, const Items&, const Scratch&);
float largest(const float* from, int64_t count, int streams);
}  // namespace portable
namespace avx2 {
void decode_items(const CacheLayer&, const DecodeStep&, const Items&, const Scratch&);
float largest(const float* from, int64_t count, int streams);
}  // namespace avx2
namespace avx512 {
void decode_items(const CacheLayer&, const DecodeStep&, const Items&, const Scratch&);
float largest(const float* from, int64_t count, int streams);
}  // namespace avx512

// Why a call was refused; nothing has been written then.
struct Error {
  enum Code { kNone = 0, kTable, kPromptLen, kPrompt, kStep } code;
  int32_t index;  // of the table row or batch row
  int32_t value;
};

// Whether every range of the head table lies inside the slab and can hold what its head may keep.
Error check_table(const CacheLayer& layer);

// Whether every row can take a step; and counting one that all rows have taken.
Error check_step(const CacheLayer& layer);
void count_step(const CacheLayer& layer);

// How many of `threads` threads the next decode step is worth, by what its rows keep.
int decode_threads(const CacheLayer& layer, int32_t query_heads, int threads);

// A decode step of every row cut into pieces, one of every row's heads each.
class DecodePieces {
 public:
  DecodePieces(const CacheLayer& layer, const DecodeStep& step, int threads);

  int64_t count() const { return int64_t{layer_.shape.batch} * layer_.shape.heads; }
  void operator()(int64_t begin, int64_t end) const;

 private:
  const CacheLayer& layer_;
  const DecodeStep step_;
  const bool row_by_row_;
  int64_t longest_ = 0;
};
// How long the pieces are that threads take (Pieces): long enough for prefetching to run across items, short enough to
// even out unequal heads.
constexpr int kDecodeShare = 16;

// One decode step of every row on at most `threads` threads.
Error decode(const CacheLayer& layer, const DecodeStep& step, int threads);

// Restarts rows with new prompts.
void prefill(const CacheLayer& layer, const Prefill& prompts, int threads);

// The largest of `count` floats, at least 1, read by `threads` threads in `streams` places each, and nothing else done.
float largest(const float* from, int64_t count, int streams, int threads);

}  // namespace ssd
