// Prompts into the slabs; with keep_prompt false rule 4 of docs/specification.md is applied to them once.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/decode.h"
#include "cpu/evict.h"
#include "cpu/threads.h"
#include "cpu/tiles.h"

namespace ssd {
namespace {

// Positions of the prompt tokens that a head keeps, ascending.
void prompt_survivors(const HeadRange& range, const RowView& view, const float* scores, std::vector<int32_t>& kept,
                      std::vector<int64_t>& ranks) {
  const int32_t prompt_len = view.base + view.first;
  kept.clear();
  if (view.first <= range.keep) {
    for (int32_t position = 0; position < prompt_len; ++position) kept.push_back(position);
    return;
  }
  // Only prompts that are not kept for good come here: base is 0 and every prompt token competes.
  if (range.kind == kWindow) {
    for (int32_t position = prompt_len - range.keep; position < prompt_len; ++position) kept.push_back(position);
    return;
  }
  ranks.resize(static_cast<size_t>(2 * prompt_len));
  for (int32_t position = 0; position < prompt_len; ++position) {
    const float score = scores ? scores[position] : 0.0f;
    const int64_t rank = range.rule == kPosition ? position : eviction_rank(score, position);
    ranks[position] = prompt_len - position <= range.recent ? kProtected : rank;
    ranks[prompt_len + position] = ranks[position];
  }
  const int64_t losing = losing_rank(ranks.data() + prompt_len, prompt_len, range.keep);
  for (int32_t position = 0; position < prompt_len; ++position)
    if (ranks[position] > losing) kept.push_back(position);
}

template <class T>
void quantise_vector(const void* vectors, int64_t from, int dim, void* bytes, float* scales, int64_t to) {
  float floats[kMaxHeadDim];
  widen<Int8>(static_cast<const T*>(vectors) + from * dim, dim, 1.0f, floats);
  scales[to] = quantise(floats, dim, static_cast<Int8*>(bytes) + to * dim);
}

// The vector number `from` of the prompts into slot `to` of a slab.
void store_vector(const CacheLayer& layer, const void* vectors, int64_t from, void* slab, float* scales, int64_t to) {
  const int dim = layer.shape.head_dim;
  if (layer.kv_format == kAuto) {
    const int64_t size = dim * item_size(layer.dtype);
    std::memcpy(static_cast<char*>(slab) + to * size, static_cast<const char*>(vectors) + from * size,
                static_cast<size_t>(size));
    return;
  }
  switch (layer.dtype) {
    case kFloat32:
      return quantise_vector<float>(vectors, from, dim, slab, scales, to);
    case kBFloat16:
      return quantise_vector<BFloat16>(vectors, from, dim, slab, scales, to);
    case kFloat16:
      return quantise_vector<Float16>(vectors, from, dim, slab, scales, to);
  }
}

}  // namespace

void prefill(const CacheLayer& layer, const Prefill& prompts, int threads) {
  const LayerShape& shape = layer.shape;
  for (int32_t entry = 0; entry < prompts.count; ++entry)
    layer.cursors[prompts.rows[entry]] = {prompts.prompt_lens[entry], 0};
  const int64_t items = int64_t{prompts.count} * shape.heads;

  parallel_for(threads, items, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> kept;
    std::vector<int64_t> ranks;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = prompts.rows[index / shape.heads];
      const HeadRange& range = layer.heads[index % shape.heads];
      const RowView view = row_view(shape, range, layer.cursors[row]);
      const float* scores = prompts.scores ? prompts.scores + index * prompts.prompt_stride : nullptr;
      prompt_survivors(range, view, scores, kept, ranks);
      for (size_t i = 0; i < kept.size(); ++i) {
        const int32_t position = kept[i];
        int32_t slot = static_cast<int32_t>(i);
        if (range.kind != kHeavy && position >= view.base) slot = view.base + (position - view.base) % view.ring;
        const int64_t from = index * prompts.prompt_stride + position;
        const int64_t to = row * shape.slots + range.offset + slot;
        store_vector(layer, prompts.k, from, layer.keys, layer.key_scales, to);
        store_vector(layer, prompts.v, from, layer.values, layer.value_scales, to);
        if (range.score_offset >= 0) {
          const int64_t scored = row * shape.scored_slots + range.score_offset + slot;
          layer.scores[scored] = scores ? scores[position] : 0.0f;
          layer.positions[scored] = position;
        }
      }
    }
  });
}

}  // namespace ssd
