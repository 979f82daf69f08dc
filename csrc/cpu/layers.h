// The decoder layers of a model over one token of every row, products and attention, with one start of threads for all
// of them.
#pragma once

#include <vector>

#include "cpu/decode.h"
#include "cpu/linear.h"

namespace ssd {

// A layer's products. What they multiply, add and write is the step's.
struct DecoderLayer {
  Linear qkv;    // [rows, hidden] to [rows, (query_heads + 2 heads) head_dim]
  Linear out;    // [rows, query_heads head_dim] to [rows, hidden]
  Linear gated;  // [rows, hidden] to [rows, intermediate]
  Linear down;   // [rows, intermediate] to [rows, hidden]
};

// One token of every row.
struct LayersStep {
  void* hidden;  // [rows, hidden], inputs and then last hidden states
  int32_t rows;
  int32_t query_heads;
  float scale;  // of the attention
  const float* cos;
  const float* sin;
  double* seconds;  // [2], to which those of products and of attention are added
};

// A cache: its layers. Its rows follow those of the caches before it.
using CacheLayers = std::vector<const CacheLayer*>;

// On up to `threads` threads. The hidden states and all caches are as they were where a row of one cannot take a step;
// `refusing` is its layer then.
Error step_layers(const std::vector<DecoderLayer>& layers, const std::vector<CacheLayers>& caches,
                  const LayersStep& step, int threads, const CacheLayer*& refusing);

}  // namespace ssd
