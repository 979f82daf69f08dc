// Products of a few rows with a matrix of weights (ssd_kernels/linear.py): what a decoder step waits for most.
#pragma once

#include <cstdint>

#include "common/layer.h"

namespace ssd {

// Rows that go through a matrix together; more are taken in turns, so that buffers stay small.
constexpr int32_t kLinearRows = 64;
// Outputs that a thread takes at once: of a gated product so many of each half.
constexpr int32_t kLinearOutputs = 32;
// Rows of the matrix that are multiplied together.
constexpr int32_t kLinearBlock = 4;

// out = f(normed(x) weight^T * scale + bias) + plus, in float32 until it is stored, but for x, which is rounded to its
// dtype once it is normed.
struct Linear {
  DType dtype;
  const void* x;       // [rows, in]
  const void* weight;  // [outputs, in], or [2 * outputs, in]: gates above what they multiply
  const float* scale;  // a number for each row of weight, which is signed bytes then; null: weight is of the dtype
  const void* bias;    // a number for each row of weight, or null
  const void* norm;    // [in] of RMSNorm (arXiv 1910.07467) on x, or null
  const void* plus;    // [rows, outputs], or null
  void* out;           // [rows, outputs]
  int64_t x_stride;    // between rows, elements
  int64_t plus_stride;
  float epsilon;  // of the norm
  int32_t rows, in, outputs;
  bool silu;   // f: SiLU
  bool gated;  // f: SiLU of the gates, times the others
};

// Elements of each row of x that lie together where the matrix is streamed. With one step's, as in blocks, two to four
// rows took up to 1.2 times as long on a Zen 4; why is not known.
constexpr int32_t kLinearRun = 256;

// Elements that a staged row takes: whole runs.
SSD_INLINE int64_t staged_stride(int32_t in) { return (in + kLinearRun - 1) / kLinearRun * kLinearRun; }
// Floats that a thread needs for the pieces of so many rows: a block of weights, and sums of four pieces.
SSD_INLINE int64_t pieces_buffer(int32_t in, int32_t rows) {
  return kLinearBlock * (staged_stride(in) + 2 * kLinearOutputs * rows);
}

// Per instruction set: rows [first, first + rows) of x, normed and as the kernel reads them; and the outputs of the
// pieces [begin, end), kLinearOutputs each, of these rows.
struct LinearKernel {
  void (*stage)(const Linear&, int32_t first, int32_t rows, float* staged, float* row);
  void (*pieces)(const Linear&, int32_t first, int32_t rows, const float* staged, int64_t begin, int64_t end,
                 float* buffer);
};
namespace portable {
extern const LinearKernel linear_kernel;
}
namespace avx2 {
extern const LinearKernel linear_kernel;
}
namespace avx512 {
extern const LinearKernel linear_kernel;
}
namespace avx512_bf16 {
extern const LinearKernel linear_kernel;
}

// A product cut into pieces of kLinearOutputs outputs, kLinearRows rows after another.
class LinearPieces {
 public:
  LinearPieces(const Linear& product, const LinearKernel& kernel) : product_(product), kernel_(kernel) {}

  // How many of `threads` threads it is worth.
  int threads(int threads) const;
  int64_t count() const { return (product_.rows + kLinearRows - 1) / kLinearRows * per_rows(); }

  // What one thread does of it. Rows of x are staged by every thread for itself, which takes as long as waiting for one
  // that does.
  class Thread {
   public:
    explicit Thread(const LinearPieces& pieces) : pieces_(pieces) {}
    void operator()(int64_t begin, int64_t end);

   private:
    const LinearPieces& pieces_;
    int64_t staged_ = -1;
  };

 private:
  int64_t per_rows() const { return (product_.outputs + kLinearOutputs - 1) / kLinearOutputs; }

  const Linear product_;
  const LinearKernel& kernel_;
};
// How long the pieces are that threads take (Pieces): a matrix is read in long runs.
constexpr int kLinearShare = 2;

// On up to `threads` threads, by the kernel of the instruction set in use.
void linear(const Linear& product, int threads);

}  // namespace ssd
