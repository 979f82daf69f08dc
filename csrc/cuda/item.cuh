// Which (row, head, part) a block serves, and where its slots lie.
#pragma once

#include "cuda/decode.h"
#include "cuda/port.cuh"

namespace ssd::cuda {

struct Item {
  int32_t row;
  int32_t head;
  int32_t part;
  int32_t parts;
  int32_t first_part;
  int32_t row_parts;  // blocks of the row
  int32_t arrived;    // what the thread that counted this block found in the cursor, or -1
  int32_t prompt_len;
  int32_t kind, offset, keep, rule, score_offset;  // of its row of the table
  RowView view;
  int32_t gap;  // kept slots lie in [0, gap) and, `skip` slots further, in as many as are left of `total`
  int32_t skip;
  int32_t total;  // tokens kept before this step, the prompt included
  int32_t new_slot;

  // The slot of the index-th kept token, in order of slots and not of age.
  SSD_DEVICE int32_t slot_of(int32_t index) const { return index < gap ? index : index + skip; }
  SSD_DEVICE int32_t position() const { return prompt_len + view.step; }
};

// Finds in the head table what the blocks of a rank serve, heads in launch order and each with all its parts, and how
// many blocks a row has. False: no such block. All lanes of a warp call it.
SSD_DEVICE bool find_item(const DecodeParams& params, int32_t rank, LaunchItem& item, int32_t& row_parts) {
  const HeadRange* table = params.layer.heads;
  const LayerShape& shape = params.layer.shape;
  if (params.workspace.parts == shape.heads) {
    const int32_t head = smaller(larger(table[rank].launch_order, 0), shape.heads - 1);
    item = launch_item(shape, table[head], head, 0, 1, rank);
    return true;
  }
  const int lane = port::lane_index();
  int32_t head = 0, parts = 0, first_part = 0, before = 0;
  bool found = false;
#pragma unroll 1
  for (int32_t first = 0; first < shape.heads; first += port::kWarp) {
    int32_t candidate = 0, its_parts = 0;
    if (first + lane < shape.heads) {
      candidate = smaller(larger(table[first + lane].launch_order, 0), shape.heads - 1);
      its_parts = parts_of(smaller(table[candidate].capacity, shape.slots + slots_apart(shape)));
    }
    int32_t until = its_parts;  // parts of the heads up to this lane's
    for (int by = 1; by < port::kWarp; by *= 2) {
      const int32_t other = port::shuffle_up(until, by);
      if (lane >= by) until += other;
    }
    const bool mine = rank >= before + until - its_parts && rank < before + until;
    const uint32_t votes = port::ballot(mine);
    if (votes != 0) {
      const int source = port::first_bit(votes);
      head = port::shuffle(candidate, source);
      parts = port::shuffle(its_parts, source);
      first_part = before + port::shuffle(until, source) - parts;
      found = true;
    }
    before += port::shuffle(until, port::kWarp - 1);
  }
  row_parts = before;
  if (!found || before > params.workspace.parts) return false;
  item = launch_item(shape, table[head], head, rank - first_part, parts, first_part);
  return true;
}

// The row's step. Whether the cursor and the row's prompt can be right is checked here: like the table, it cannot be
// checked on the host without waiting for the device. High bits of the step count the blocks that have read it; the
// rest changes when all have.
SSD_DEVICE Turn read_turn(const DecodeParams& params, int32_t row, int32_t row_parts) {
  const Cursor* at = params.layer.cursors + row;
  Cursor cursor{at->prompt_len, port::load_relaxed(&at->step)};
  const int32_t arrived = cursor.step >> kArrivalShift;
  cursor.step &= kMaxSteps;
  const LayerShape& shape = params.layer.shape;
  const int32_t since = cursor.step - divide(cursor.step, params.period) * eviction_period(shape);
  const bool valid = cursor_valid(shape, cursor) && prompt_valid(shape, params.layer.prompt_of, row);
  return {cursor, since, valid && arrived >= 0 && arrived < row_parts};
}

// Fills in what an item of the launch means in a row's step. False: the row cannot be stepped, or the head's row of the
// table cannot be right, and nothing may be written. What the host has listed, it has checked.
SSD_DEVICE bool locate(const DecodeParams& params, const LaunchItem& listed, const Turn& turn, Item& item) {
  const LayerShape& shape = params.layer.shape;
  item.head = listed.head;
  item.part = listed.part;
  item.parts = listed.parts;
  item.first_part = listed.first_part;
  item.kind = listed.kind;
  item.offset = listed.offset;
  item.keep = listed.keep;
  item.rule = listed.rule;
  item.score_offset = listed.score_offset;
  if (!turn.goes_on) return false;
  item.prompt_len = turn.cursor.prompt_len;
  item.view = row_view(shape, listed.keep, listed.ring, turn.cursor, turn.since);
  const RowView& view = item.view;
  const bool heavy = listed.kind == kHeavy;
  if (!params.workspace.items) {
    const HeadRange range = params.layer.heads[listed.head];
    if (!range_valid(shape, range) || item.parts < parts_of(range.capacity) || view.evictable >= view.ring ||
        (heavy && view.ring > params.workspace.largest))
      return false;
  }
  item.total = view.base + view.evictable;
  const int32_t next = view.first + view.step, at = next - divide(next, listed.by_ring) * view.ring;
  item.new_slot = view.base + (heavy ? view.evictable : at);
  const int32_t oldest = at - view.evictable + (at < view.evictable ? view.ring : 0);
  const int32_t begin = heavy ? 0 : oldest;
  const int32_t wrapped = larger(begin + view.evictable - view.ring, 0);
  item.skip = begin - wrapped;
  item.gap = item.skip == 0 ? item.total : view.base + wrapped;
  return true;
}

}  // namespace ssd::cuda
