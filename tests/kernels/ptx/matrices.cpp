// Products of matrices, and matrices between shared memory and registers.
#include "step.h"

namespace ptx {

// 16 x 16 times 16 x 8 of 16-bit floats, added up in float. Hardware adds in an order of its own.
void multiply_matrices(Step& step) {
  const auto value = [&](uint64_t word, int half) {
    const auto bits = static_cast<uint16_t>(word >> (16 * half));
    return step.in.bfloat ? bfloat_to_float(bits) : ssd::float16_to_float(bits);
  };
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][column + i / 2 * 8 + half] = value(step.read(1, i)[lane], half);
      for (int i = 0; i < 2; ++i) {
        b[column + i * 8 + half][row] = value(step.read(2, i)[lane], half);
        c[row + i * 8][column + half] = from_bits<float>(step.read(3, 2 * i + half)[lane]);
      }
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  if (step.undefined) step.undefined = kAllLanes;
  for (int i = 0; i < 4; ++i) {
    uint64_t* d = step.write(i);
    for (int lane = 0; lane < kLanes; ++lane) d[lane] = to_bits(c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
}

// ldmatrix and stmatrix: each lane of eight gives the address of a row of eight 16-bit elements.
void move_matrices(Step& step) {
  const Instruction& in = step.in;
  const bool loads = in.op == Op::kLoadMatrix;
  const Operand &address = in.operands[loads ? 1 : 0], &data = in.operands[loads ? 0 : 1];
  const int rows = 8 * in.vector;
  const auto pointing = static_cast<uint32_t>(ones(rows));
  const uint64_t* base = step.read_row(address.rows[0], pointing);
  step.require_defined("an address");
  uint64_t at[kLanes] = {};
  for (int row = 0; row < rows; ++row) at[row] = static_cast<uint32_t>(base[row] + address.offset);
  for (int m = 0; m < in.vector; ++m) {
    uint16_t matrix[8][8];
    bool defined[8];
    for (int row = 0; loads && row < 8; ++row)
      defined[row] =
          step.memory.load_shared(step.block, step.warp.thread(m * 8 + row), at[m * 8 + row], 16, matrix[row]);
    // A lane's two elements are neighbours in its row, or in its column if transposed.
    const auto place = [&](int lane, int e, int& row, int& column) {
      row = in.transposed ? lane % 4 * 2 + e : lane / 4;
      column = in.transposed ? lane / 4 : lane % 4 * 2 + e;
    };
    if (loads) {
      step.undefined = 0;
      uint64_t words[kLanes] = {};
      for (int lane = 0; lane < kLanes; ++lane)
        for (int e = 0, row, column; e < 2; ++e) {
          place(lane, e, row, column);
          words[lane] |= static_cast<uint64_t>(matrix[row][column]) << (16 * e);
          step.undefined |= static_cast<uint32_t>(!defined[row]) << lane;
        }
      std::memcpy(step.write(m), words, sizeof words);
      continue;
    }
    const uint64_t* words = step.read_row(data.rows[m], kAllLanes);
    step.require_defined("stored as a matrix");
    for (int lane = 0; lane < kLanes; ++lane)
      for (int e = 0, row, column; e < 2; ++e) {
        place(lane, e, row, column);
        matrix[row][column] = static_cast<uint16_t>(words[lane] >> (16 * e));
      }
    for (int row = 0; row < 8; ++row)
      step.memory.store_shared(step.block, step.warp.thread(m * 8 + row), at[m * 8 + row], 16, matrix[row], true);
  }
  count_shared(step.context, at, pointing, 16);
}

}  // namespace ptx
