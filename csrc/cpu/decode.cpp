// Checks tables and cursors, and cuts a decode step into pieces.
#include "cpu/decode.h"

#include <algorithm>
#include <vector>

#include "cpu/instruction_sets.h"
#include "cpu/threads.h"

namespace ssd {
namespace {

// Largest number of evictable tokens a head may hold; the twin of ssd_kernels/layout.py peak_tokens.
int64_t peak_tokens(int64_t keep, int64_t first, int64_t num_visual_tokens, int64_t period) {
  const int64_t last_whole = num_visual_tokens / period * period;
  int64_t peak = std::min(keep, first + last_whole) + num_visual_tokens - last_whole;
  if (last_whole > 0) peak = std::max(peak, std::min(keep, first + last_whole - period) + period);
  return peak;
}

// Per-thread buffers that only ever grow, so that decoding does not allocate once warm.
class Workspace {
 public:
  Scratch scratch(int64_t group, int64_t head_dim, int64_t longest) {
    const int64_t query = group * query_floats(static_cast<int32_t>(head_dim)), acc = group * head_dim;
    const int64_t logits = group * padded(static_cast<int32_t>(longest));
    const int64_t heads = (group + 15) / 16 * 16;
    const size_t floats = static_cast<size_t>(query + acc + 2 * heads + logits + 17 * head_dim);
    if (floats_.size() < floats) floats_.resize(floats);
    if (ranks_.size() < static_cast<size_t>(2 * longest)) ranks_.resize(static_cast<size_t>(2 * longest));
    float* at = floats_.data();
    Scratch scratch;
    scratch.q = at;
    scratch.acc = at += query;
    scratch.unit = at += acc;
    scratch.inverse = at += heads;
    scratch.logits = at += heads;
    scratch.tile = at += logits;
    scratch.rotated = at += 16 * head_dim;
    scratch.ranks = ranks_.data();
    return scratch;
  }

 private:
  std::vector<float> floats_;
  std::vector<int64_t> ranks_;
};

thread_local Workspace workspace;

}  // namespace

Error check_table(const CacheLayer& layer) {
  const LayerShape& shape = layer.shape;
  std::vector<bool> launched(static_cast<size_t>(shape.heads), false);
  for (int32_t head = 0; head < shape.heads; ++head) {
    const HeadRange& range = layer.heads[head];
    const int64_t evictable_prompt = shape.keep_prompt ? 0 : shape.max_prompt;
    const int64_t needed =
        peak_tokens(range.keep, evictable_prompt, shape.num_visual_tokens, std::max(shape.row_buffer, 1)) +
        shape.max_prompt - evictable_prompt;
    const bool valid = range_valid(shape, range) && range.kind >= kFull && range.kind <= kHeavy && range.recent >= 0 &&
                       range.recent <= range.keep && range.capacity >= needed && range.launch_order >= 0 &&
                       range.launch_order < shape.heads && !launched[static_cast<size_t>(range.launch_order)];
    if (!valid) return {Error::kTable, head, 0};
    launched[static_cast<size_t>(range.launch_order)] = true;
  }
  return {Error::kNone, 0, 0};
}

int decode_threads(const CacheLayer& layer, int32_t query_heads, int threads) {
  const LayerShape& shape = layer.shape;
  int64_t slots = 0;
  for (int32_t row = 0; row < shape.batch && threads > 1; ++row) {
    for (int32_t head = 0; head < shape.heads; ++head) {
      const RowView view = row_view(shape, layer.heads[head], layer.cursors[row]);
      slots += view.base + view.evictable + 1;
    }
  }
  const int64_t elements = 2 * slots * shape.head_dim;  // of keys and values
  return worthwhile_threads(elements * stored_size(layer), elements * (query_heads / shape.heads), threads);
}

Error check_step(const CacheLayer& layer) {
  const LayerShape& shape = layer.shape;
  for (int32_t row = 0; row < shape.batch; ++row) {
    const Cursor cursor = layer.cursors[row];
    if (!prompt_valid(shape, layer.prompt_of, row)) return {Error::kPrompt, row, layer.prompt_of[row]};
    if (cursor_valid(shape, cursor)) continue;
    if (cursor.prompt_len < 0 || cursor.prompt_len > shape.max_prompt)
      return {Error::kPromptLen, row, cursor.prompt_len};
    return {Error::kStep, row, cursor.step};
  }
  return {Error::kNone, 0, 0};
}

void count_step(const CacheLayer& layer) {
  for (int32_t row = 0; row < layer.shape.batch; ++row) ++layer.cursors[row].step;
}

DecodePieces::DecodePieces(const CacheLayer& layer, const DecodeStep& step, int threads)
    : layer_(layer), step_(step), row_by_row_(threads == 1 || layer.shape.batch >= 4 * int64_t{threads}) {
  for (int32_t head = 0; head < layer.shape.heads; ++head)
    longest_ = std::max<int64_t>(longest_, layer.heads[head].capacity);
}

void DecodePieces::operator()(int64_t begin, int64_t end) const {
  const LayerShape& shape = layer_.shape;
  kernels().decode_items(layer_, step_, {begin, end, row_by_row_},
                         workspace.scratch(step_.query_heads / shape.heads, shape.head_dim, longest_));
}

Error decode(const CacheLayer& layer, const DecodeStep& step, int threads) {
  const Error error = check_step(layer);
  if (error.code != Error::kNone) return error;
  threads = decode_threads(layer, step.query_heads, threads);
  const DecodePieces pieces(layer, step, threads);
  parallel_for(threads, pieces.count(), kDecodeShare, pieces);
  count_step(layer);
  return error;
}

}  // namespace ssd
