// Prompts into the slabs, one block per (prompt, head); with keep_prompt false rule 4 of
// docs/specification.md is applied once.
#include "cuda/decode.h"
#include "cuda/evict.cuh"
#include "cuda/int8.cuh"
#include "cuda/port.cuh"

namespace ssd::cuda {
namespace {

// Where each prompt token goes, from the head's first slot, or -1: slots [prompt_len] in shared memory.
SSD_DEVICE void place(const CacheLayer& layer, const HeadRange& range, const float* scores, int32_t prompt_len,
                      int64_t* ranks, int32_t* slots, DigitCounts* counts) {
  const int32_t losers = layer.shape.keep_prompt ? 0 : larger(prompt_len - range.keep, 0);
  if (range.kind != kHeavy || losers == 0) {
    const int32_t ring = layer.shape.keep_prompt ? larger(prompt_len, 1) : larger(range.capacity, 1);
    for (int32_t i = port::thread_index(); i < prompt_len; i += kThreads)
      slots[i] = i < losers ? -1 : range.kind == kHeavy ? i : i % ring;
    port::sync_block();
    return;
  }
  // No token is visual yet, so none is pinned, and no step divides the score.
  const PinMask nothing{nullptr, 0};
  for (int32_t i = port::thread_index(); i < prompt_len; i += kThreads)
    ranks[i] = token_rank(range.rule, range.recent, scores ? scores[i] : 0.0f, i, prompt_len, 0, nothing);
  port::sync_block();  // the ranks are there
  const LastLoser last = last_loser(ranks, prompt_len, losers, counts);
  if (port::thread_index() < port::kWarp) {
    int32_t kept = 0;
    for (int32_t first = 0; first < prompt_len; first += port::kWarp) {
      const int32_t i = first + port::thread_index();
      const bool stays = i < prompt_len && !last.loses(ranks[i], i);
      const uint32_t votes = port::ballot(stays);
      if (i < prompt_len) slots[i] = stays ? kept + port::count_bits(votes & ((1u << port::thread_index()) - 1)) : -1;
      kept += port::count_bits(votes);
    }
  }
  port::sync_block();
}

// A token's key or value into a slot as bytes, by a warp: `from` and `to` are counted in vectors.
SSD_DEVICE void store_bytes(const CacheLayer& layer, const void* vectors, int64_t from, void* slab, float* scales,
                            int64_t to) {
  using Vector = WarpVector<kMaxHeadDim>;
  const int32_t dim = layer.shape.head_dim;
  Vector vector;
  with_type<Int8>(layer.dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(vectors) + from * dim;
    vector.load(dim, [&](int32_t e, float* to) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = port::to_float(x[e + i]);
    });
  });
  uint32_t words[Vector::kQuads];
  const float scale = vector.quantise(words);
  Vector::store(words, dim, static_cast<Int8*>(slab) + to * dim);
  if (port::lane_index() == 0) scales[to] = scale;
}

SSD_KERNEL(kThreads, 4)
prefill_kernel(const PrefillParams params) {
  const CacheLayer& layer = params.layer;
  const Prefill& prompts = params.prompts;
  const LayerShape& shape = layer.shape;
  const int32_t entry = port::block_column() / shape.heads, head = port::block_column() % shape.heads;
  const int32_t row = prompts.rows[entry], prompt_len = prompts.prompt_lens[entry];
  const HeadRange range = layer.heads[head];
  if (!range_valid(shape, range)) return;
  const float* scores =
      prompts.scores ? prompts.scores + static_cast<int64_t>(port::block_column()) * prompts.prompt_stride : nullptr;
  int64_t* ranks = reinterpret_cast<int64_t*>(port::shared_memory());
  int32_t* slots = reinterpret_cast<int32_t*>(ranks + prompts.prompt_stride);
  DigitCounts* counts = reinterpret_cast<DigitCounts*>(slots + prompts.prompt_stride);
  place(layer, range, scores, prompt_len, ranks, slots, counts);

  const int64_t slot_chunks = shape.head_dim * item_size(layer.dtype) / 16;
  const int64_t first = static_cast<int64_t>(port::block_column()) * prompts.prompt_stride;
  const int64_t first_slot = static_cast<int64_t>(row) * shape.slots + range.offset;
  const int warp = port::warp_index(), lane = port::lane_index();
  for (int32_t i = warp; i < prompt_len; i += kWarps) {
    if (slots[i] < 0) continue;
    const int64_t from = first + i, to = first_slot + slots[i];
    if (layer.kv_format == kInt8) {
      store_bytes(layer, prompts.k, from, layer.keys, layer.key_scales, to);
      store_bytes(layer, prompts.v, from, layer.values, layer.value_scales, to);
    } else {
      for (int64_t chunk = lane; chunk < slot_chunks; chunk += port::kWarp) {
        const int64_t source = from * slot_chunks + chunk, target = to * slot_chunks + chunk;
        static_cast<Chunk*>(layer.keys)[target] = static_cast<const Chunk*>(prompts.k)[source];
        static_cast<Chunk*>(layer.values)[target] = static_cast<const Chunk*>(prompts.v)[source];
      }
    }
    if (range.score_offset >= 0 && lane == 0) {
      const int64_t scored = static_cast<int64_t>(row) * shape.scored_slots + range.score_offset + slots[i];
      layer.scores[scored] = scores ? scores[i] : 0.0f;
      layer.positions[scored] = i;
    }
  }
  if (head == 0 && port::thread_index() == 0) layer.cursors[row] = {prompt_len, 0};
}

}  // namespace

int start_prefill(const PrefillParams& params, const Launch& launch, void* stream) {
  return port::launch<prefill_kernel>(launch, stream, params);
}

}  // namespace ssd::cuda
