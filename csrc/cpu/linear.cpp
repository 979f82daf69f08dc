// What a thread does of a product.
#include "cpu/linear.h"

#include <algorithm>
#include <vector>

#include "cpu/instruction_sets.h"
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

thread_local Buffer rows_buffer, sums_buffer;

}  // namespace

int LinearPieces::threads(int threads) const {
  const int64_t weights = int64_t{product_.in} * product_.outputs * (product_.gated ? 2 : 1);
  return worthwhile_threads(weights * (product_.scale ? 1 : item_size(product_.dtype)),
                            weights * std::min(product_.rows, kLinearRows), threads);
}

void LinearPieces::Thread::operator()(int64_t begin, int64_t end) {
  const Linear& product = pieces_.product_;
  const int64_t stride = staged_stride(product.in), per_rows = pieces_.per_rows();
  while (begin < end) {
    const int64_t block = begin / per_rows, next = std::min(end, (block + 1) * per_rows);
    const int32_t first = static_cast<int32_t>(block) * kLinearRows;
    const int32_t rows = std::min(kLinearRows, product.rows - first);
    float* staged = rows_buffer.of((rows + 1) * stride);
    if (block != staged_) pieces_.kernel_.stage(product, first, rows, staged, staged + rows * stride);
    staged_ = block;
    pieces_.kernel_.pieces(product, first, rows, staged, begin - block * per_rows, next - block * per_rows,
                           sums_buffer.of(pieces_buffer(product.in, rows)));
    begin = next;
  }
}

void linear(const Linear& product, int threads) {
  const LinearPieces pieces(product, *kernels().linear);
  threads = pieces.threads(threads);
  Pieces shared(pieces.count(), threads, kLinearShare);
  in_parallel(threads, [&] { shared.take(LinearPieces::Thread(pieces)); });
}

}  // namespace ssd
