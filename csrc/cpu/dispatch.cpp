// Chooses the instruction set, checks cursors, and shares the (row, head) items out to threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

#include "cpu/decode.h"
#include "cpu/instruction_sets.h"
#include "cpu/linear.h"
#include "cpu/threads.h"

namespace ssd {
namespace {

struct InstructionSet {
  const char* name;
  bool (*present)();
  void (*decode_items)(const CacheLayer&, const DecodeStep&, const Items&, const Scratch&);
  float (*largest)(const float*, int64_t, int);
  const LinearKernel* linear;
};

#if SSD_KERNELS_HAVE_X86
bool have_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
// Of processors with bfloat16 instructions only Cooper Lake has no look-ups by byte.
bool have_avx512_bf16() {
  return have_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
// Not every compiler knows "f16c", which every processor with AVX2 has.
bool have_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
bool have_portable() { return true; }

// Best first.
const InstructionSet kSets[] = {
#if SSD_KERNELS_HAVE_X86
    {"avx512_bf16", have_avx512_bf16, avx512::decode_items, avx512::largest, &avx512_bf16::linear_kernel},
    {"avx512", have_avx512, avx512::decode_items, avx512::largest, &avx512::linear_kernel},
    {"avx2", have_avx2, avx2::decode_items, avx2::largest, &avx2::linear_kernel},
#endif
    {"portable", have_portable, portable::decode_items, portable::largest, &portable::linear_kernel},
};

const InstructionSet*& current() {
  static const InstructionSet* chosen =
      std::find_if(std::begin(kSets), std::end(kSets), [](const InstructionSet& set) { return set.present(); });
  return chosen;
}

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

std::vector<const char*> instruction_sets() {
  std::vector<const char*> names;
  for (const InstructionSet& set : kSets) names.push_back(set.name);
  return names;
}

const char* instruction_set() { return current()->name; }

bool set_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (std::strcmp(set.name, name) || !set.present()) continue;
    current() = &set;
    return true;
  }
  return false;
}

void linear(const Linear& product, int threads) { linear(product, *current()->linear, threads); }

float largest(const float* from, int64_t count, int streams, int threads) {
  const int64_t piece = (count + threads - 1) / threads;
  std::vector<float> found(static_cast<size_t>(threads), -INFINITY);
  const auto read = current()->largest;
  parallel_for(threads, count, piece, [&](int64_t begin, int64_t end) {
    found[static_cast<size_t>(begin / piece)] = read(from + begin, end - begin, streams);
  });
  return *std::max_element(found.begin(), found.end());
}

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

Error decode(const CacheLayer& layer, const DecodeStep& step, int threads) {
  const LayerShape& shape = layer.shape;
  for (int32_t row = 0; row < shape.batch; ++row) {
    const Cursor cursor = layer.cursors[row];
    if (!prompt_valid(shape, layer.prompt_of, row)) return {Error::kPrompt, row, layer.prompt_of[row]};
    if (cursor_valid(shape, cursor)) continue;
    if (cursor.prompt_len < 0 || cursor.prompt_len > shape.max_prompt)
      return {Error::kPromptLen, row, cursor.prompt_len};
    return {Error::kStep, row, cursor.step};
  }
  threads = decode_threads(layer, step.query_heads, threads);
  int64_t longest = 0;
  for (int32_t head = 0; head < shape.heads; ++head) longest = std::max<int64_t>(longest, layer.heads[head].capacity);
  const int64_t items = int64_t{shape.batch} * shape.heads;
  const int64_t group = step.query_heads / shape.heads;
  // Chunks long enough for prefetching to run across items, short enough to even out unequal heads.
  const int64_t chunk = std::max<int64_t>(1, items / (int64_t{threads} * 16));
  const bool row_by_row = threads == 1 || shape.batch >= 4 * int64_t{threads};
  const auto decode_items = current()->decode_items;

  parallel_for(threads, items, chunk, [&](int64_t begin, int64_t end) {
    decode_items(layer, step, {begin, end, row_by_row}, workspace.scratch(group, shape.head_dim, longest));
  });
  for (int32_t row = 0; row < shape.batch; ++row) ++layer.cursors[row].step;
  return {Error::kNone, 0, 0};
}

}  // namespace ssd
