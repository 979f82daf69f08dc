// The fused decode step (docs/specification.md, section 3): one block per (row, head), or per part of a long head.
// docs/cuda.md explains it.
//
// Logits, scores and ranks stay on chip, unless a head is split: then its last block finds the others' results in
// memory and finishes the step.
#pragma once

#include "cuda/attend.cuh"
#include "cuda/decode.h"
#include "cuda/evict.cuh"
#include "cuda/item.cuh"
#include "cuda/port.cuh"

namespace ssd::cuda {

constexpr float kLog2E = 1.4426950408889634f;

template <class T, int kDim, int kGroup>
struct Decoder : Attention<T, kDim, kGroup> {
  using Base = Attention<T, kDim, kGroup>;
  using Base::appends, Base::begin, Base::count, Base::item, Base::keys, Base::shape, Base::shared, Base::values;

  const DecodeParams& params;

  SSD_DEVICE Decoder(const DecodeParams& params, const Item& item) : Base(params.layer, item), params(params) {}

  SSD_DEVICE int32_t group() const { return params.group; }
  SSD_DEVICE bool scored() const { return item.score_offset >= 0; }
  SSD_DEVICE bool evicts() const {
    return item.kind == kHeavy && refresh_due(item.view) && item.view.evictable + 1 > item.keep;
  }
  SSD_DEVICE float decayed(float score) const { return item.rule == kDecayed ? score * kDecay : score; }
  SSD_DEVICE int64_t scored_at() const {
    return static_cast<int64_t>(item.row) * params.layer.shape.scored_slots + item.score_offset - item.view.unscored;
  }

  // What lies behind the sums; see ranking_bytes.
  SSD_DEVICE int64_t* ranks() const {
    return reinterpret_cast<int64_t*>(&shared.sums[0][0][0] + sizeof(shared.sums) / 4);
  }
  SSD_DEVICE int32_t* lists() const { return reinterpret_cast<int32_t*>(ranks() + params.workspace.largest + 1); }
  SSD_DEVICE DigitCounts* counts() const {
    return reinterpret_cast<DigitCounts*>(lists() + params.workspace.largest + 1);
  }
  SSD_DEVICE float* maxima() const { return reinterpret_cast<float*>(counts() + 1); }
  SSD_DEVICE float* norms() const { return maxima() + group(); }

  // Scores and, where they will be needed, positions of the part's tokens: for the threads that copy them. And what is
  // not in the launch list.
  SSD_DEVICE void fetch_scores() const {
    if (evicts() && port::thread_index() == 0)
      port::copy_async<4>(&shared.recent, &params.layer.heads[item.head].recent);
    if (item.parts > 1) return;
#pragma unroll 1
    for (int32_t j = port::thread_index(); j < count; j += kThreads) {
      if (j < item.view.unscored) continue;
      const int64_t from = scored_at() + item.slot_of(j);
      port::copy_async<4>(shared.scores + j, params.layer.scores + from);
      if (evicts()) port::copy_async<4>(shared.positions + j, params.layer.positions + from);
    }
  }

  // Element e of a vector of the step, turned to the new token's position if the step says so, and rounded as q, k and
  // v are.
  template <class E>
  SSD_DEVICE E element(const E* x, int32_t e) const {
    if (!params.step.cos) return x[e];
    return turned(x, e, 0);
  }
  // Element e + i, both in one half of the vector.
  template <class E>
  SSD_DEVICE E turned(const E* x, int32_t e, int i) const {
    const int32_t half = shape.dim() / 2;
    const bool first = e < half;
    const int32_t pair = first ? e : e - half;
    const int64_t angle = static_cast<int64_t>(item.position()) * half + pair;
    const float cos = params.step.cos[angle + i], sin = params.step.sin[angle + i];
    const float a = port::to_float(x[pair + i]), b = port::to_float(x[pair + half + i]);
    E result;
    port::from_float(first ? a * cos - b * sin : b * cos + a * sin, &result);
    return result;
  }

  SSD_DEVICE int64_t key_at() const {
    return item.row * params.step.k_row_stride + item.head * params.step.k_head_stride;
  }
  SSD_DEVICE int64_t value_at() const {
    return item.row * params.step.v_row_stride + item.head * params.step.v_head_stride;
  }
  SSD_DEVICE int64_t query_at(int32_t g) const {
    return item.row * params.step.q_row_stride + (item.head * group() + g) * params.step.q_head_stride;
  }

  // Rule 1: the new token into its slot, and its key and value as floats into shared memory.
  SSD_DEVICE void append() const {
    const T* k = static_cast<const T*>(params.step.k) + key_at();
    const T* v = static_cast<const T*>(params.step.v) + value_at();
    const int64_t slot = static_cast<int64_t>(item.new_slot) * shape.dim();
#pragma unroll 1
    for (int32_t e = port::thread_index(); e < shape.dim(); e += kThreads) {
      const T key = element(k, e), value = v[e];
      const_cast<T*>(keys)[slot + e] = key;
      const_cast<T*>(values)[slot + e] = value;
      shared.fresh[0][e] = port::to_float(key);
      shared.fresh[1][e] = port::to_float(value);
    }
  }

  // The queries from g0 on, scaled to give logits in base 2, as floats into shared memory.
  SSD_DEVICE void stage_queries(int32_t g0) const {
    const float scale = params.step.scale * kLog2E;
    const T* first = static_cast<const T*>(params.step.q) + query_at(g0);
#pragma unroll 1
    for (int g = 0; g < kGroup; ++g)
#pragma unroll 1
      for (int32_t e = port::thread_index(); e < shape.dim(); e += kThreads)
        shared.queries[g][e] =
            g0 + g < group() ? port::to_float(element(first + g * params.step.q_head_stride, e)) * scale : 0.0f;
  }

  // Both where slots are bytes. A warp has a vector: the first one the key, the second the value, and queries begin
  // with the third.
  SSD_DEVICE void append_and_stage_bytes(int32_t g0) const {
    using Vector = WarpVector<kWidthOf<kDim>>;
    const int warp = port::warp_index();
    const int32_t first = g0 == 0 ? 0 : 2;
#pragma unroll 1
    for (int32_t job = first + (warp - first & kWarps - 1); job < kGroup + 2; job += kWarps) {
      if (job < 2 ? !appends : g0 + job - 2 >= group()) continue;
      Vector vector;
      with_type<T>(params.layer.dtype, [&](auto type) {
        using E = decltype(type);
        const void* from = job == 0 ? params.step.k : job == 1 ? params.step.v : params.step.q;
        const E* x = static_cast<const E*>(from) + (job == 0   ? key_at()
                                                    : job == 1 ? value_at()
                                                               : query_at(g0 + job - 2));
        const bool turns = job != 1 && params.step.cos;
        vector.load(shape.dim(), [&](int32_t e, float* to) {
#pragma unroll
          for (int i = 0; i < 4; ++i) to[i] = port::to_float(turns ? turned(x, e, i) : x[e + i]);
        });
      });
      if (job < 2) {
        keep_bytes(vector, job);
        continue;
      }
      uint32_t words[Vector::kQuads][kQueryDigits];
      const float scale = vector.digits(words);
#pragma unroll
      for (int digit = 0; digit < kQueryDigits; ++digit)
#pragma unroll
        for (int quad = 0; quad < Vector::kQuads; ++quad)
          if (Vector::first(quad) < shape.dim())
            shared.queries[job - 2][digit][Vector::first(quad) / 4] = words[quad][digit];
      if (port::lane_index() == 0) shared.query_scales[job - 2] = scale * params.step.scale * kLog2E;
    }
  }

  // Rule 1 for the new token's key (which 0) or value (1).
  template <class Vector>
  SSD_DEVICE void keep_bytes(const Vector& vector, int which) const {
    T* slot = const_cast<T*>(which == 0 ? keys : values) + static_cast<int64_t>(item.new_slot) * shape.dim();
    uint32_t words[Vector::kQuads];
    const float scale = vector.quantise(words);
    Vector::store(words, shape.dim(), slot);
    Vector::store(words, shape.dim(), shared.fresh[which]);
    if (port::lane_index() != 0) return;
    (which == 0 ? params.layer.key_scales : params.layer.value_scales)[this->first_slot() + item.new_slot] = scale;
    shared.fresh_scales[which] = scale;
  }

  SSD_DEVICE void put_output(int32_t g, int32_t e, float value) const {
    const int32_t head = item.head * group() + g;
    const int64_t at = (static_cast<int64_t>(item.row) * params.step.query_heads + head) * shape.dim() + e;
    with_type<T>(params.layer.dtype,
                 [&](auto type) { port::from_float(value, static_cast<decltype(type)*>(params.step.out) + at); });
  }

  // What a split head's part hands over for a query head: [head_dim] sums, maximum, norm.
  SSD_DEVICE float* partial(int32_t part, int32_t g) const {
    const int64_t index = static_cast<int64_t>(item.row) * params.workspace.parts + item.first_part + part;
    return params.workspace.partials + (index * group() + g) * (shape.dim() + 2);
  }
  SSD_DEVICE float* split_logits(int32_t g) const {
    const int64_t index = static_cast<int64_t>(item.row) * group() + g;
    return params.workspace.logits + index * params.layer.shape.scored_slots + item.score_offset - item.view.unscored;
  }

  // Rule 2 for the query heads g0 .. of the group: their output, or this part's share of it.
  SSD_DEVICE void attend(int32_t g0) {
    typename Base::Query q[kGroup][Base::kCopies];
    this->load_queries(q);
    this->attend_keys(q);
    port::sync_block();
    const int32_t members = smaller(group() - g0, kGroup);
    float highest[kGroup], norm[kGroup], inverse[kGroup];
    this->normalize(highest, norm);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) inverse[g] = g < members ? 1.0f / norm[g] : 0.0f;
    if (scored()) keep_gains(g0, members, highest, inverse);
    float acc[kGroup][Base::kCopies][Base::kVector] = {};
    this->attend_values(highest, acc);
    port::sync_block();  // all have read their stages
    this->share_sums(acc);
    port::sync_block();
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (g >= members) continue;
      float* split = item.parts > 1 ? partial(item.part, g0 + g) : nullptr;
#pragma unroll 1
      for (int32_t e = port::thread_index(); e < shape.dim(); e += kThreads) {
        const float total = this->sum(g, e, highest[g]);
        if (split)
          split[e] = total;
        else
          put_output(g0 + g, e, total * inverse[g]);
      }
      if (split && port::thread_index() == 0) {
        split[shape.dim()] = highest[g];
        split[shape.dim() + 1] = norm[g];
      }
    }
  }

  // What tokens gain from these query heads, onto their scores; of a split head only the logits, for the block that
  // will know the norms.
  SSD_DEVICE void keep_gains(int32_t g0, int32_t members, const float highest[kGroup],
                             const float inverse[kGroup]) const {
#pragma unroll 1
    for (int32_t j = port::thread_index(); j < count + appends; j += kThreads) {
      if (begin + j < item.view.unscored && j < count) continue;
      const int32_t at = j < count ? j : kNewToken;
      if (item.parts > 1) {
        const int32_t slot = j < count ? item.slot_of(begin + j) : item.new_slot;
#pragma unroll 1
        for (int g = 0; g < members; ++g) split_logits(g0 + g)[slot] = shared.logits[g][at];
        continue;
      }
      float gain = 0.0f;
#pragma unroll
      for (int g = 0; g < kGroup; ++g)
        if (g < members) gain += port::power_of_two(shared.logits[g][at] - highest[g]) * inverse[g];
      float score = j < count || g0 > 0 ? shared.scores[j] : 0.0f;
      if (g0 == 0) score = decayed(score);
      shared.scores[j] = score + gain;
    }
  }

  // Whether this block is the last of its head's to come here; then it sees what the others have written.
  SSD_DEVICE bool last_part() const {
    port::sync_block();
    if (port::thread_index() == 0) {
      int32_t* arrivals = params.workspace.arrivals + item.row * params.layer.shape.heads + item.head;
      port::fence();
      const bool last = port::atomic_add(arrivals, 1) == item.parts - 1;
      if (last) port::store_relaxed(arrivals, 0);
      shared.last = last;
      port::fence();
    }
    port::sync_block();
    return shared.last;
  }

  // A split head's output from its parts, which are combined in order; leaves [group] maxima and norms. What several
  // parts have left is loaded at once.
  SSD_DEVICE void combine() const {
    constexpr int kTogether = 4;
    const int32_t parts = larger((item.total + kPartSlots - 1) / kPartSlots, 1);  // those that held a token
    const int32_t dim = shape.dim();
#pragma unroll 1
    for (int32_t g = 0; g < group(); ++g)
#pragma unroll 1
      for (int32_t e = port::thread_index(); e < dim; e += kThreads) {
        float highest = -INFINITY, norm = 0.0f, total = 0.0f;
#pragma unroll 1
        for (int32_t first = 0; first < parts; first += kTogether) {
          float sums[kTogether], highs[kTogether], masses[kTogether];
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            const float* from = partial(smaller(first + i, parts - 1), g);
            sums[i] = port::load_shared_by_blocks(from + e);
            highs[i] = port::load_shared_by_blocks(from + dim);
            masses[i] = port::load_shared_by_blocks(from + dim + 1);
          }
          float raised = highest;
#pragma unroll
          for (int i = 0; i < kTogether; ++i) raised = fmaxf(raised, highs[i]);
          const float scale = port::power_of_two(highest - raised);
          highest = raised;
          norm *= scale;
          total *= scale;
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            if (first + i >= parts) continue;
            const float weight = port::power_of_two(highs[i] - highest);
            norm += masses[i] * weight;
            total += sums[i] * weight;
          }
        }
        put_output(g, e, total / norm);
        if (e == 0) {
          maxima()[g] = highest;
          norms()[g] = norm;
        }
      }
    port::sync_block();
  }

  // Rules 3 and 4, by the one block that knows the whole head.
  SSD_DEVICE void score_and_evict() const {
    const bool split = item.parts > 1;
    const bool evicting = evicts();
    float* scores = params.layer.scores + scored_at();
    int32_t* positions = params.layer.positions + scored_at();
    const PinMask pinned = pin_mask(params.layer.shape, params.layer.pinned, item.head);
#pragma unroll 1
    for (int32_t j = port::thread_index(); j <= item.total; j += kThreads) {
      if (j < item.view.unscored) continue;
      const bool is_new = j == item.total;
      const int32_t slot = is_new ? item.new_slot : item.slot_of(j);
      float score;
      if (split) {
        score = decayed(is_new ? 0.0f : scores[slot]);
#pragma unroll 1
        for (int32_t g = 0; g < group(); ++g)
          score += port::power_of_two(port::load_shared_by_blocks(split_logits(g) + slot) - maxima()[g]) / norms()[g];
      } else {
        score = shared.scores[j];
      }
      scores[slot] = score;
      if (is_new) positions[slot] = item.position();
      if (evicting && j >= item.view.base) {
        const int32_t position = is_new ? item.position() : split ? positions[slot] : shared.positions[j];
        ranks()[j - item.view.base] =
            token_rank(item.rule, shared.recent, score, position, item.prompt_len, item.view.step + 1, pinned);
      }
    }
    if (!evicting) return;
    port::sync_block();
    const int64_t first = static_cast<int64_t>(item.view.base) * shape.dim();
    float *key_scales = nullptr, *value_scales = nullptr;
    if constexpr (Base::kInt8) {
      key_scales = params.layer.key_scales + this->first_slot() + item.view.base;
      value_scales = params.layer.value_scales + this->first_slot() + item.view.base;
    }
    const Evictable<T> head{const_cast<T*>(keys) + first,
                            const_cast<T*>(values) + first,
                            scores + item.view.base,
                            positions + item.view.base,
                            key_scales,
                            value_scales};
    evict(head, item.view.evictable + 1, item.keep, shape.dim(), ranks(), lists(), counts(), &shared.moves);
  }

  // The first copies of a pass over the slots.
  SSD_DEVICE void start(bool with_scores) {
    this->run_end = 0;
    this->copy_tile(0);
    if constexpr (Base::kInt8) this->fetch_scales();
    if (with_scores) fetch_scores();
    port::commit_copies();
#pragma unroll 1
    for (int stage = 1; stage < kStages - 1; ++stage) this->fetch(stage);
  }

  SSD_DEVICE void run() {
    start(scored());
    if constexpr (!Base::kInt8)
      if (appends) append();
    for (int32_t g0 = 0;;) {
      if constexpr (Base::kInt8)
        append_and_stage_bytes(g0);
      else
        stage_queries(g0);
      if (g0 == 0) advance(params, item, item.view.step + 1);
      port::sync_block();
      attend(g0);
      port::wait_copies<0>();
      g0 += kGroup;
      if (kGroup == 1 || g0 >= group()) break;
      port::sync_block();  // the sums lie where the stages were
      start(false);
    }
    if (item.parts > 1) {
      if (!last_part()) return;
      combine();
    }
    if (scored()) score_and_evict();
  }

  // The row's last block to have read the cursor takes it to `step`, and the count with it.
  SSD_DEVICE static void advance(const DecodeParams& params, const Item& item, int32_t step) {
    if (port::thread_index() == 0 && item.arrived >= (item.row_parts - 1) << kArrivalShift)
      port::store_relaxed(&params.layer.cursors[item.row].step, step);
  }

  // The whole output of a row or head that cannot be stepped.
  SSD_DEVICE static void clear(const DecodeParams& params, const Item& item) {
    const int64_t first = static_cast<int64_t>(item.row) * params.step.query_heads + item.head * params.group;
    const int64_t begin = first * params.layer.shape.head_dim;
    with_type<T>(params.layer.dtype, [&](auto type) {
#pragma unroll 1
      for (int32_t e = port::thread_index(); e < params.group * params.layer.shape.head_dim; e += kThreads)
        port::from_float(0.0f, static_cast<decltype(type)*>(params.step.out) + begin + e);
    });
  }
};

template <class T, int kDim, int kGroup>
SSD_KERNEL(kThreads, blocks_per_multiprocessor(port::kCapability, kDim, kGroup, std::is_same_v<T, Int8>))
decode_kernel(const DecodeParams params) {
  using Block = Decoder<T, kDim, kGroup>;
  auto& shared = *reinterpret_cast<typename Block::Memory*>(port::shared_memory());
  Item item;
  item.row = port::block_column();
  item.row_parts = params.workspace.parts;
  item.arrived = -1;
  LaunchItem listed;
  if (params.workspace.items)
    listed = port::load(params.workspace.items + port::block_row());
  else if (!find_item(params, port::block_row(), listed, item.row_parts))
    return;
  // One thread reads the cursor, for the row's other blocks count in it, and all of this block must see the same.
  if (port::thread_index() == 0) {
    Cursor* cursor = params.layer.cursors + item.row;
    const Turn turn = read_turn(params, item.row, item.row_parts);
    shared.turn = turn;
    if (params.layer.shape.shared_prompts) shared.prompt = params.layer.prompt_of[item.row];
    if (turn.goes_on) item.arrived = port::atomic_add(&cursor->step, 1 << kArrivalShift);
  }
  port::sync_block();
  const Turn turn = shared.turn;
  if (locate(params, listed, turn, item)) {
    Block(params, item).run();
  } else {
    if (item.part == 0) Block::clear(params, item);
    Block::advance(params, item, turn.cursor.step + 1);
  }
}

template <class T, int kDim>
int start_decode(const DecodeParams& params, const Launch& launch, void* stream) {
  const auto start = params.step.query_heads == params.layer.shape.heads
                         ? port::launch<decode_kernel<T, kDim, 1>, DecodeParams>
                         : port::launch<decode_kernel<T, kDim, kGroupBlock>, DecodeParams>;
  return start(launch, stream, params);
}

}  // namespace ssd::cuda
