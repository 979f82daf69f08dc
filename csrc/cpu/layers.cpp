// Threads go through the operations of all layers in order. None waits for another thread, only for what the operation
// before has pieces of: one that comes late finds less left to do.
#include "cpu/layers.h"

#include <chrono>
#include <deque>
#include <thread>

#include "cpu/instruction_sets.h"
#include "cpu/threads.h"

namespace ssd {
namespace {

// Memory that only ever grows, so that nothing is allocated once warm.
char* workspace(int64_t bytes) {
  constexpr int64_t kLine = 64;
  thread_local std::vector<char> buffer;
  if (static_cast<int64_t>(buffer.size()) < bytes + kLine) buffer.resize(static_cast<size_t>(bytes + kLine));
  return buffer.data() + (kLine - reinterpret_cast<uintptr_t>(buffer.data()) % kLine) % kLine;
}

// Attention of a layer over all caches, as one sequence of pieces.
class Attention {
 public:
  void add(const CacheLayer& layer, const DecodeStep& step, int threads) {
    parts_.push_back({DecodePieces(layer, step, threads), count_});
    count_ += parts_.back().pieces.count();
  }
  int64_t count() const { return count_; }
  void operator()(int64_t begin, int64_t end) const {
    for (const Part& part : parts_) {
      const int64_t first = std::max(begin, part.first), last = std::min(end, part.first + part.pieces.count());
      if (first < last) part.pieces(first - part.first, last - part.first);
    }
  }

 private:
  struct Part {
    DecodePieces pieces;
    int64_t first;
  };
  std::vector<Part> parts_;
  int64_t count_ = 0;
};

// One layer's operations, with what is left of each.
struct Work {
  LinearPieces qkv;
  Attention attention;
  LinearPieces out, gated, down;
  Pieces qkv_left, attention_left, out_left, gated_left, down_left;

  Work(const Linear products[4], Attention attended, int threads)
      : qkv(products[0], *kernels().linear),
        attention(std::move(attended)),
        out(products[1], *kernels().linear),
        gated(products[2], *kernels().linear),
        down(products[3], *kernels().linear),
        qkv_left(qkv.count(), threads, kLinearShare),
        attention_left(attention.count(), threads, kDecodeShare),
        out_left(out.count(), threads, kLinearShare),
        gated_left(gated.count(), threads, kLinearShare),
        down_left(down.count(), threads, kLinearShare) {}
};

void multiply(const LinearPieces& pieces, Pieces& left) {
  left.take(LinearPieces::Thread(pieces));
  left.wait();
}

Linear bound(Linear product, const void* x, const void* plus, void* out, int32_t rows) {
  product.x = x;
  product.x_stride = product.in;
  product.plus = plus;
  product.plus_stride = product.outputs;
  product.out = out;
  product.rows = rows;
  return product;
}

// Seconds of one thread's way through operations.
class Clock {
 public:
  explicit Clock(double* seconds) : seconds_(seconds) { lap(0); }
  void lap(int part) {
    if (!seconds_) return;
    const auto now = std::chrono::steady_clock::now();
    if (began_ != Time{}) seconds_[part] += std::chrono::duration<double>(now - began_).count();
    began_ = now;
  }

 private:
  using Time = std::chrono::steady_clock::time_point;
  double* const seconds_;
  Time began_{};
};

int64_t elements(const Linear& product) { return int64_t{product.in} * product.outputs * (product.gated ? 2 : 1); }
int64_t bytes(const Linear& product) { return elements(product) * (product.scale ? 1 : item_size(product.dtype)); }

}  // namespace

Error step_layers(const std::vector<DecoderLayer>& layers, const std::vector<CacheLayers>& caches,
                  const LayersStep& step, int threads, const CacheLayer*& refusing) {
  for (const CacheLayers& cache : caches) {
    for (const CacheLayer* layer : cache) {
      const Error error = check_step(*layer);
      if (error.code == Error::kNone) continue;
      refusing = layer;
      return error;
    }
  }
  if (layers.empty() || caches.empty()) return {Error::kNone, 0, 0};

  const DecoderLayer& first = layers[0];
  const LayerShape& shape = caches[0][0]->shape;
  const int64_t item = item_size(first.qkv.dtype), dim = shape.head_dim;
  const int64_t heads = step.query_heads + 2 * int64_t{shape.heads};
  const int64_t projected = heads * dim, attended = step.query_heads * dim;
  char* const projection = workspace(step.rows * (projected + attended + first.down.in) * item);
  char* const attention_out = projection + step.rows * projected * item;
  char* const middle = attention_out + step.rows * attended * item;

  int64_t read = 0, multiplied = 0;
  for (const DecoderLayer& layer : layers) {
    read += bytes(layer.qkv) + bytes(layer.out) + bytes(layer.gated) + bytes(layer.down);
    multiplied += elements(layer.qkv) + elements(layer.out) + elements(layer.gated) + elements(layer.down);
  }
  threads = worthwhile_threads(read, multiplied * std::min(step.rows, kLinearRows), threads);

  std::deque<Work> work;
  for (size_t l = 0; l < layers.size(); ++l) {
    const DecoderLayer& layer = layers[l];
    Attention attention;
    int64_t row = 0;
    for (const CacheLayers& cache : caches) {
      const char* q = projection + row * projected * item;
      attention.add(*cache[l],
                    {q, q + step.query_heads * dim * item, q + (heads - shape.heads) * dim * item,
                     attention_out + row * attended * item, step.query_heads, projected, dim, projected, dim, projected,
                     dim, step.scale, step.cos, step.sin},
                    threads);
      row += cache[l]->shape.batch;
    }
    const Linear products[4] = {bound(layer.qkv, step.hidden, nullptr, projection, step.rows),
                                bound(layer.out, attention_out, step.hidden, step.hidden, step.rows),
                                bound(layer.gated, step.hidden, nullptr, middle, step.rows),
                                bound(layer.down, middle, step.hidden, step.hidden, step.rows)};
    work.emplace_back(products, std::move(attention), threads);
  }

  const std::thread::id caller = std::this_thread::get_id();
  in_parallel(threads, [&] {
    Clock clock(std::this_thread::get_id() == caller ? step.seconds : nullptr);
    for (Work& layer : work) {
      multiply(layer.qkv, layer.qkv_left);
      clock.lap(0);
      layer.attention_left.take(layer.attention);
      layer.attention_left.wait();
      clock.lap(1);
      multiply(layer.out, layer.out_left);
      multiply(layer.gated, layer.gated_left);
      multiply(layer.down, layer.down_left);
      clock.lap(0);
    }
  });
  for (const CacheLayers& cache : caches)
    for (const CacheLayer* layer : cache) count_step(*layer);
  return {Error::kNone, 0, 0};
}

}  // namespace ssd
