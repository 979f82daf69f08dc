// One instruction of a warp: its lanes, operands, and which of them are undefined.
//
// Undefined values may be moved and computed with, for compilers do so with values that are not used afterwards; but
// they must decide nothing: no address, predicate, vote or value in global memory.
#pragma once

#include "context.h"
#include "memory.h"
#include "state.h"
#include "values.h"

namespace ptx {

class Step {
 public:
  Step(Context& context, Memory& memory, Block& block, Warp& warp, const Instruction& in, uint32_t lanes)
      : context(context), memory(memory), block(block), warp(warp), in(in), lanes(lanes) {}

  Context& context;
  Memory& memory;
  Block& block;
  Warp& warp;
  const Instruction& in;
  const uint32_t lanes;
  uint32_t undefined = 0;  // lanes that have read something undefined; what is written next is so there

  // A row of the register file, by lane.
  const uint64_t* read_row(int row, uint32_t of) {
    undefined |= ~warp.defined[row] & of;
    return values(row);
  }
  const uint64_t* read(int operand, int element = 0) { return read_row(in.operands[operand].rows[element], lanes); }
  uint64_t* write_row(int row, uint32_t of) {
    if (row == kNoRow) return nowhere_;
    warp.defined[row] = (warp.defined[row] & ~of) | (of & ~undefined);
    return values(row);
  }
  uint64_t* write(int element = 0) { return write_row(in.operands[0].rows[element], lanes); }
  // Of the destination, a row's.
  void mark_undefined(int element, uint32_t of) {
    if (const int row = in.operands[0].rows[element]; row != kNoRow) warp.defined[row] &= ~of;
  }
  // Reports what has been read and may not be undefined.
  void require_defined(const char* what) {
    if (undefined) context.report(std::string("an undefined value is ") + what);
    undefined = 0;
  }
  // Bits of a row.
  int width(int row) const { return row == kNoRow ? 64 : 8 * context.function.widths[row]; }

 private:
  uint64_t* values(int row) { return &warp.values[static_cast<size_t>(row) * kLanes]; }

  uint64_t nowhere_[kLanes];
};

// Instructions of each lane by itself. False: not of this kind.
bool compute(Step& step);          // arithmetic.cpp
bool manipulate_bits(Step& step);  // bits.cpp
bool convert(Step& step);          // convert.cpp
bool access_memory(Step& step);    // accesses.cpp

// Of reductions that are no swap.
uint64_t reduced(uint8_t how, int64_t a, int64_t b);  // accesses.cpp

// Instructions of a warp's lanes together, which all stand there.
void exchange(Step& step);           // exchange.cpp
void multiply_matrices(Step& step);  // matrices.cpp
void move_matrices(Step& step);      // matrices.cpp

// Count one access of a warp by the addresses of its lanes: counts.cpp
void count_global(Context& context, const uint64_t at[kLanes], uint32_t lanes, int bytes);
void count_shared(Context& context, const uint64_t at[kLanes], uint32_t lanes, int bytes);
// Counts an instruction of a warp that is issued in order; and a barrier, where all wait for the slowest.
void count_issue(Context& context, Warp& warp, const Instruction& in);
void count_barrier(Block& block);

}  // namespace ptx
