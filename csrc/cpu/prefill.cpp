// Prompts into the slabs; with keep_prompt false rule 4 of docs/specification.md is applied to them once.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/decode.h"
#include "cpu/evict.h"
#include "cpu/threads.h"

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

}  // namespace

void prefill(const CacheLayer& layer, const Prefill& prompts, int threads) {
  const LayerShape& shape = layer.shape;
  for (int32_t entry = 0; entry < prompts.count; ++entry)
    layer.cursors[prompts.rows[entry]] = {prompts.prompt_lens[entry], 0};
  const int64_t items = int64_t{prompts.count} * shape.heads;
  const int64_t slot_bytes = shape.head_dim * item_size(layer.dtype);

  parallel_for(threads, items, std::max<int64_t>(1, (items + threads - 1) / threads), [&](int64_t begin, int64_t end) {
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
        const int64_t from = (index * prompts.prompt_stride + position) * slot_bytes;
        const int64_t to = (row * shape.slots + range.offset + slot) * slot_bytes;
        std::memcpy(static_cast<char*>(layer.keys) + to, static_cast<const char*>(prompts.k) + from,
                    static_cast<size_t>(slot_bytes));
        std::memcpy(static_cast<char*>(layer.values) + to, static_cast<const char*>(prompts.v) + from,
                    static_cast<size_t>(slot_bytes));
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
