// Shares the outputs of a product out to threads.
#include "cpu/linear.h"

#include <algorithm>
#include <vector>

#include "cpu/threads.h"

namespace ssd {
namespace {

// A buffer that only ever grows, so that nothing is allocated once warm.
class Buffer {
 public:
  float* of(int64_t floats) {
    constexpr int64_t kLine = 16;
    if (static_cast<int64_t>(floats_.size()) < floats + kLine) floats_.resize(static_cast<size_t>(floats + kLine));
    const uintptr_t at = reinterpret_cast<uintptr_t>(floats_.data());
    return reinterpret_cast<float*>((at + 63) / 64 * 64);
  }

 private:
  std::vector<float> floats_;
};

thread_local Buffer rows_buffer, thread_buffer;

}  // namespace

void linear(const Linear& product, const LinearKernel& kernel, int threads) {
  const int64_t stride = staged_stride(product.in);
  const int64_t weights = int64_t{product.in} * product.outputs * (product.gated ? 2 : 1);
  threads = worthwhile_threads(weights * (product.scale ? 1 : item_size(product.dtype)),
                               weights * std::min(product.rows, kLinearRows), threads);
  const int64_t pieces = (product.outputs + kLinearOutputs - 1) / kLinearOutputs;
  for (int32_t first = 0; first < product.rows; first += kLinearRows) {
    const int32_t rows = std::min(kLinearRows, product.rows - first);
    float* staged = rows_buffer.of((rows + 1) * stride);
    kernel.stage(product, first, rows, staged, staged + rows * stride);
    const int64_t chunk = std::max<int64_t>(1, pieces / (int64_t{threads} * 8));
    parallel_for(threads, pieces, chunk, [&](int64_t begin, int64_t end) {
      kernel.pieces(product, first, rows, staged, begin, end, thread_buffer.of(pieces_buffer(product.in, rows)));
    });
  }
}

}  // namespace ssd
