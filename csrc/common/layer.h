// What the compiled backends receive: plain structs of raw pointers, on the CPU or on a GPU.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace ssd {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
// How slots hold keys and values: in the layer's dtype, or as signed bytes with a scale per slot.
enum KVFormat : int32_t { kAuto = 0, kInt8 = 1 };

// One layer's cache. Slabs and scales are contiguous.
struct CacheLayer {
  LayerShape shape;
  DType dtype;  // of q, k, v and the output
  KVFormat kv_format;
  void* keys;          // [batch, slots, head_dim]
  void* values;        // [batch, slots, head_dim]
  float* scores;       // [batch, scored_slots]
  int32_t* positions;  // [batch, scored_slots]
  Cursor* cursors;     // [batch]
  const HeadRange* heads;
  const int32_t* pinned;  // [heads, pin_words]
  // Where rows share prompts, else null.
  const void* prompt_keys;    // [shared_prompts, heads, max_prompt, head_dim]
  const void* prompt_values;  // [shared_prompts, heads, max_prompt, head_dim]
  const int32_t* prompt_of;   // [batch]
  // Where kv_format is kInt8, else null.
  float* key_scales;                 // [batch, slots]
  float* value_scales;               // [batch, slots]
  const float* prompt_key_scales;    // [shared_prompts, heads, max_prompt], or null
  const float* prompt_value_scales;  // [shared_prompts, heads, max_prompt], or null
};

// One decode step. Strides are in elements; the last dimension of q, k and v has unit stride.
struct DecodeStep {
  const void* q;  // [batch, query_heads, head_dim]
  const void* k;  // [batch, heads, head_dim]
  const void* v;  // [batch, heads, head_dim]
  void* out;      // [batch, query_heads, head_dim], contiguous
  int32_t query_heads;
  int64_t q_row_stride, q_head_stride;
  int64_t k_row_stride, k_head_stride;
  int64_t v_row_stride, v_head_stride;
  float scale;
  // Rotation of q and k by their position, [max_prompt + num_visual_tokens, head_dim / 2]; null: they are rotated.
  const float* cos;
  const float* sin;
};

// New prompts for some rows; k and v are contiguous [count, heads, prompt_stride, head_dim].
struct Prefill {
  const void* k;
  const void* v;
  const float* scores;  // [count, heads, prompt_stride] or null
  int32_t prompt_stride;
  int32_t count;
  const int32_t* prompt_lens;  // [count]
  const int32_t* rows;         // [count]
};

SSD_INLINE int64_t item_size(DType dtype) { return dtype == kFloat32 ? 4 : 2; }
// Bytes of one element of a stored key or value.
SSD_INLINE int64_t stored_size(const CacheLayer& layer) {
  return layer.kv_format == kInt8 ? 1 : item_size(layer.dtype);
}

}  // namespace ssd
