// Which (row, head, part) a block serves, and where its slots lie.
#pragma once

#include "cuda/decode.h"
#include "cuda/port.cuh"

namespace ssd::cuda {

struct Item {
  int32_t row;
  int32_t head;
  int32_t part;  // of `parts`: the head's kept tokens [part * kPartSlots, (part + 1) * kPartSlots)
  int32_t parts;
  int32_t first_part;  // parts of the heads launched before this one
  int32_t row_parts;   // of all heads
  int32_t prompt_len;
  HeadRange range;
  RowView view;
  int32_t gap;  // kept slots lie in [0, gap) and, `skip` slots further, in as many as are left of `total`
  int32_t skip;
  int32_t total;  // tokens kept before this step, the prompt included
  int32_t new_slot;

  // The slot of the index-th kept token, in order of slots and not of age.
  SSD_DEVICE int32_t slot_of(int32_t index) const { return index < gap ? index : index + skip; }
  SSD_DEVICE int32_t position() const { return prompt_len + view.step; }
};

// Finds the head of the rank-th block of a row, heads in launch order and each with all its parts. False: no such
// block. All lanes of a warp call it.
SSD_DEVICE bool find_head(const DecodeParams& params, int32_t rank, Item& item) {
  const HeadRange* table = params.layer.heads;
  const int32_t heads = params.layer.shape.heads;
  if (params.workspace.parts == heads) {
    item.head = smaller(larger(table[rank].launch_order, 0), heads - 1);
    item.part = 0;
    item.parts = 1;
    item.first_part = rank;
    item.row_parts = heads;
    return true;
  }
  const int lane = port::thread_index() % port::kWarp;
  bool found = false;
  int32_t before = 0;
#pragma unroll 1
  for (int32_t first = 0; first < heads; first += port::kWarp) {
    int32_t head = 0, parts = 0;
    if (first + lane < heads) {
      head = smaller(larger(table[first + lane].launch_order, 0), heads - 1);
      parts = parts_of(smaller(table[head].capacity, params.layer.shape.slots));
    }
    int32_t until = parts;  // parts of the heads up to this lane's
    for (int by = 1; by < port::kWarp; by *= 2) {
      const int32_t other = port::shuffle_up(until, by);
      if (lane >= by) until += other;
    }
    const bool mine = rank >= before + until - parts && rank < before + until;
    const uint32_t votes = port::ballot(mine);
    if (votes != 0) {
      const int source = port::first_bit(votes);
      item.head = port::shuffle(head, source);
      item.parts = port::shuffle(parts, source);
      item.first_part = before + port::shuffle(until, source) - item.parts;
      found = true;
    }
    before += port::shuffle(until, port::kWarp - 1);
  }
  item.part = rank - item.first_part;
  item.row_parts = before;
  return found && before <= params.workspace.parts;
}

// Whether the cursor can be right. Like the table it cannot be checked on the host without waiting for the device.
SSD_DEVICE bool cursor_fine(const DecodeParams& params, Cursor& cursor, int32_t row_parts) {
  const int32_t arrived = cursor.step >> kArrivalShift;
  cursor.step &= kMaxSteps;
  return cursor_valid(params.layer.shape, cursor) && arrived >= 0 && arrived < row_parts;
}

// Fills in the rest. False: the head's row of the table cannot be right, and nothing may be written.
SSD_DEVICE bool locate(const DecodeParams& params, const HeadRange& range, Cursor cursor, Item& item) {
  const LayerShape& shape = params.layer.shape;
  if (!range_valid(shape, range)) return false;
  item.range = range;
  item.prompt_len = cursor.prompt_len;
  item.view = row_view(shape, range, cursor);
  const RowView& view = item.view;
  item.total = view.base + view.evictable;
  if (item.parts < parts_of(range.capacity) || view.evictable >= view.ring) return false;
  if (range.kind == kHeavy && view.ring > params.workspace.largest) return false;
  item.new_slot = next_slot(range, view);
  const int32_t begin = range.kind == kHeavy ? 0 : (view.first + view.step - view.evictable) % view.ring;
  const int32_t wrapped = larger(begin + view.evictable - view.ring, 0);
  item.gap = view.base + wrapped;
  item.skip = begin - wrapped;
  return true;
}

}  // namespace ssd::cuda
