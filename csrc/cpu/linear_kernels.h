// Products of a few rows with a matrix of weights that is read once, in the order in which it lies in memory. Written
// once and compiled once per instruction set, as kernels.h.
//
// Four rows of the matrix are multiplied with a few rows of x at a time, each of these pairs with a vector of sums of
// its own. A pair's products are added up in the same order whatever else is computed. With the fewest rows of x these
// four are streams far from each other, which hardware prefetchers follow; otherwise they are neighbours, and the next
// four are prefetched meanwhile.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/linear.h"
#include "cpu/linear_dots.h"

namespace ssd {
namespace {

// Memory that is touched before it is needed, some lines at a time, into the second-level cache: the first has no room
// for four rows beside x.
struct Ahead {
  const char* at;
  const char* end;

  SSD_ALWAYS_INLINE void touch(int lines) {
    for (int i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Rows of x that go through the matrix together are divided evenly into tiles.
template <class D>
SSD_INLINE int32_t tiles_of(int32_t rows) {
  return (rows + D::kRows - 1) / D::kRows;
}
SSD_INLINE int32_t tile_rows(int32_t rows, int32_t tiles, int32_t tile) { return (rows + tiles - 1 - tile) / tiles; }

// A tile, staged: kRun elements of each row in turn, then the next ones.
template <class D>
struct Tile {
  const typename D::Staged* x;
  int32_t in;
};

// sums[r * sum_stride + i] = row i of the weights . row r of x, for kLinearBlock rows of weights that lie `apart`.
template <class D, int kRun, int kCount, class W>
SSD_ALWAYS_INLINE void dot_block(const W* weight, int64_t apart, const Tile<D>& tile, Ahead& ahead, int lines,
                                 float* sums, int64_t sum_stride) {
  constexpr int kStep = D::kStep;
  typename D::Sum sum[kCount][kLinearBlock];
  for (int r = 0; r < kCount; ++r)
    for (int i = 0; i < kLinearBlock; ++i) sum[r][i] = D::none();
  const auto step = [&](const W* w, int64_t w_apart, const typename D::Staged* x) __attribute__((always_inline)) {
    for (int i = 0; i < kLinearBlock; ++i) {
      const typename D::Loaded loaded = D::loaded(w + i * w_apart);
      for (int r = 0; r < kCount; ++r) sum[r][i] = D::add(loaded, x + r * kRun, sum[r][i]);
    }
  };
  int32_t k = 0;
  if constexpr (kRun == kStep) {
    for (; k + kStep <= tile.in; k += kStep) {
      ahead.touch(lines);
      step(weight + k, apart, tile.x + static_cast<int64_t>(k) * kCount);
    }
  } else {
    while (k + kStep <= tile.in) {
      const typename D::Staged* x = tile.x + static_cast<int64_t>(k) * kCount;
      for (const int32_t end = smaller(k + kRun, tile.in); k + kStep <= end; k += kStep, x += kStep)
        step(weight + k, apart, x);
    }
  }
  if (k < tile.in) {  // what lies behind the last row is not ours to read
    W last[kLinearBlock * kStep];
    std::memset(static_cast<void*>(last), 0, sizeof last);
    for (int i = 0; i < kLinearBlock; ++i)
      std::memcpy(last + i * kStep, weight + i * apart + k, sizeof(W) * (tile.in - k));
    step(last, kStep, tile.x + static_cast<int64_t>(k - k % kRun) * kCount + k % kRun);
  }
  for (int r = 0; r < kCount; ++r) D::total_four(sum[r], sums + r * sum_stride);
}

template <class D, int kRun, int kCount = D::kRows, class W>
SSD_ALWAYS_INLINE void dot_rows(int count, const W* weight, int64_t apart, const Tile<D>& tile, Ahead& ahead, int lines,
                                float* sums, int64_t sum_stride) {
  if (count == kCount) return dot_block<D, kRun, kCount>(weight, apart, tile, ahead, lines, sums, sum_stride);
  if constexpr (kCount > 1) dot_rows<D, kRun, kCount - 1>(count, weight, apart, tile, ahead, lines, sums, sum_stride);
}

// The first `count` of a vector's elements; zeros behind them.
template <class T>
SSD_ALWAYS_INLINE Vec load_some(const T* p, int count) {
  if (count >= Vec::kWidth) return load(p);
  T some[Vec::kWidth];
  std::memset(static_cast<void*>(some), 0, sizeof some);
  std::memcpy(some, p, sizeof(T) * count);
  return load(some);
}

template <class T>
SSD_ALWAYS_INLINE void store_some(T* p, Vec a, int count) {
  if (count >= Vec::kWidth) return store(p, a);
  T some[Vec::kWidth];
  store(some, a);
  std::memcpy(p, some, sizeof(T) * count);
}

// x / (1 + e^-x), by exponentials of what is not positive.
SSD_INLINE Vec silu(Vec x) {
  const Vec e = exp_of_negative(min(x, mul(x, broadcast(-1.0f))));
  const Vec one = broadcast(1.0f);
  const Vec numerator = add(e, zero_where_below(add(one, mul(e, broadcast(-1.0f))), x, zero()));
  return mul(x, divide(numerator, add(one, e)));
}

// A row of x, normed and rounded as x is, in floats.
template <class T>
SSD_ALWAYS_INLINE void normed(const Linear& product, const T* x, float* row) {
  const int32_t in = product.in;
  const int64_t stride = staged_stride(in);
  Vec squares = zero();
  for (int32_t k = 0; k < stride; k += Vec::kWidth) {
    const Vec some = k < in ? load_some(x + k, in - k) : zero();
    squares = fma(some, some, squares);
    store(row + k, some);
  }
  if (!product.norm) return;
  const T* norm = static_cast<const T*>(product.norm);
  const Vec inverse = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(in) + product.epsilon));
  for (int32_t k = 0; k < in; k += Vec::kWidth) {
    T rounded[Vec::kWidth];
    store(rounded, mul(mul(load(row + k), inverse), load_some(norm + k, in - k)));
    store(row + k, load(rounded));
  }
}

template <class T, class W>
void stage_rows(const Linear& product, int32_t first, int32_t rows, float* staged, float* row) {
  using D = Dot<T, W>;
  const int64_t stride = staged_stride(product.in);
  const int32_t tiles = tiles_of<D>(rows), run = D::template streams<W>(rows, product.in) ? kLinearRun : D::kStep;
  const T* x = static_cast<const T*>(product.x) + first * product.x_stride;
  auto* to = reinterpret_cast<typename D::Staged*>(staged);
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const int32_t size = tile_rows(rows, tiles, tile);
    for (int32_t r = 0; r < size; ++r, x += product.x_stride) {
      normed(product, x, row);
      for (int32_t k = 0; k < stride; k += D::kStep)
        D::stage(row + k, to + int64_t{k - k % run} * size + r * run + k % run);
    }
    to += size * stride;
  }
}

// A row of weights as its Dot multiplies it.
template <class D>
SSD_ALWAYS_INLINE void widen_row(const Int8* from, int32_t in, typename D::Staged* to) {
  int32_t k = 0;
  for (; k + D::kStep <= in; k += D::kStep) D::widen(from + k, to + k);
  if (k == in) return;
  Int8 last[D::kStep] = {};
  std::memcpy(last, from + k, static_cast<size_t>(in - k));
  D::widen(last, to + k);
}

// What follows the products, for `count` outputs of a row from `output` on; those of the other half lie `half` behind.
template <class T>
SSD_ALWAYS_INLINE void finish(const Linear& product, int32_t row, int32_t output, int32_t count, const float* sums,
                              int64_t half) {
  const T* bias = static_cast<const T*>(product.bias);
  const T* plus = static_cast<const T*>(product.plus) + row * product.plus_stride + output;
  T* out = static_cast<T*>(product.out) + static_cast<int64_t>(row) * product.outputs + output;
  for (int32_t i = 0; i < count; i += Vec::kWidth) {
    const int some = count - i;
    Vec value = load(sums + i);
    if (product.scale) value = mul(value, load_some(product.scale + output + i, some));
    if (bias) value = add(value, load_some(bias + output + i, some));
    if (product.silu) value = silu(value);
    if (product.gated) {
      Vec other = load(sums + half + i);
      if (product.scale) other = mul(other, load_some(product.scale + product.outputs + output + i, some));
      if (bias) other = add(other, load_some(bias + product.outputs + output + i, some));
      value = mul(value, other);
    }
    if (product.plus) value = add(load_some(plus + i, some), value);
    store_some(out + i, value, some);
  }
}

// Blocks of four neighbours, while the next block is fetched.
template <class T, class W>
void tiled_pieces(const Linear& product, int32_t first, int32_t rows, const float* staged, int64_t begin, int64_t end,
                  float* buffer) {
  using D = Dot<T, W>;
  const int64_t in = product.in, stride = staged_stride(product.in);
  const int32_t halves = product.gated ? 2 : 1;
  const int64_t sum_stride = halves * kLinearOutputs;
  const int32_t tiles = tiles_of<D>(rows);
  constexpr int kLines = (kLinearBlock * D::kStep * sizeof(W) + 63) / 64;
  const int lines = (kLines + tiles - 1) / tiles;
  const W* weights = static_cast<const W*>(product.weight);
  const W* last = weights + halves * product.outputs * in;
  float* sums = buffer + kLinearBlock * stride;

  for (int64_t piece = begin; piece < end; ++piece) {
    const int32_t output = static_cast<int32_t>(piece) * kLinearOutputs;
    const int32_t count = smaller(kLinearOutputs, product.outputs - output);
    for (int32_t half = 0; half < halves; ++half) {
      const W* weight = weights + (static_cast<int64_t>(half) * product.outputs + output) * in;
      for (int32_t i = 0; i < count;) {
        const int32_t block = count - i < kLinearBlock ? 1 : kLinearBlock;
        const W* next = weight + (i + block) * in;
        if (i + block >= count)
          next = half + 1 < halves ? weights + (product.outputs + output) * in
                                   : weights + (static_cast<int64_t>(output) + kLinearOutputs) * in;
        Ahead ahead{reinterpret_cast<const char*>(next),
                    reinterpret_cast<const char*>(next + kLinearBlock * in < last ? next + kLinearBlock * in : last)};
        const auto multiply = [&](const auto* rows_of_it, int64_t apart, int32_t width) __attribute__((always_inline)) {
          const auto* x = reinterpret_cast<const typename D::Staged*>(staged);
          float* to = sums + half * kLinearOutputs + i;
          if (block == 1) apart = 0;
          for (int32_t tile = 0; tile < tiles; ++tile) {
            const int32_t size = tile_rows(rows, tiles, tile);
            dot_rows<D, D::kStep>(size, rows_of_it, apart, Tile<D>{x, width}, ahead, lines, to, sum_stride);
            x += size * stride;
            to += size * sum_stride;
          }
        };
        if constexpr (D::kWidens) {
          if (tiles > 1) {
            auto* wide = reinterpret_cast<typename D::Staged*>(buffer);
            for (int32_t b = 0; b < block; ++b) widen_row<D>(weight + (i + b) * in, product.in, wide + b * stride);
            const int32_t whole = (product.in + D::kStep - 1) / D::kStep * D::kStep;
            multiply(wide, stride, whole);  // zeros behind, in the order of a step
          } else {
            multiply(weight + i * in, in, product.in);
          }
        } else {
          multiply(weight + i * in, in, product.in);
        }
        i += block;
      }
    }
    for (int32_t row = 0; row < rows; ++row)
      finish<T>(product, first + row, output, count, sums + row * sum_stride, kLinearOutputs);
  }
}

// For as few rows of x as stream: the pieces' rows of the matrix are read as four streams, each in the order of
// addresses and so long that hardware prefetchers run ahead in all of them.
template <class T, class W>
void streamed_pieces(const Linear& product, int32_t first, int32_t rows, const float* staged, int64_t begin,
                     int64_t end, float* buffer) {
  using D = Dot<T, W>;
  const int64_t in = product.in;
  const int32_t halves = product.gated ? 2 : 1;
  constexpr int64_t kHalf = kLinearBlock * kLinearOutputs;
  const int64_t sum_stride = halves * kHalf;
  const W* weights = static_cast<const W*>(product.weight);
  const Tile<D> tile{reinterpret_cast<const typename D::Staged*>(staged), product.in};
  Ahead none{nullptr, nullptr};

  // `count` outputs of each of so many streams, `apart` outputs from each other.
  const auto run = [&](int32_t output, int32_t count, int32_t streams, int32_t apart) __attribute__((always_inline)) {
    for (int32_t half = 0; half < halves; ++half)
      for (int32_t i = 0; i < count; ++i) {
        const W* weight = weights + (static_cast<int64_t>(half) * product.outputs + output + i) * in;
        float four[D::kStreamed][kLinearBlock];
        dot_rows<D, kLinearRun, D::kStreamed>(rows, weight, apart * in, tile, none, 0, four[0], kLinearBlock);
        for (int32_t row = 0; row < rows; ++row)
          for (int s = 0; s < kLinearBlock; ++s)
            buffer[row * sum_stride + half * kHalf + s * kLinearOutputs + i] = four[row][s];
      }
    for (int32_t row = 0; row < rows; ++row)
      for (int32_t s = 0; s < streams; ++s)
        finish<T>(product, first + row, output + s * apart, count, buffer + row * sum_stride + s * kLinearOutputs,
                  kHalf);
  };
  const int32_t from = static_cast<int32_t>(begin) * kLinearOutputs;
  const int32_t to = smaller(static_cast<int32_t>(end) * kLinearOutputs, product.outputs);
  const int32_t length = (to - from) / kLinearBlock;
  for (int32_t i = 0; i < length; i += kLinearOutputs)
    run(from + i, smaller(kLinearOutputs, length - i), kLinearBlock, length);
  const int32_t done = from + kLinearBlock * length;
  if (done < to) run(done, to - done, 1, 0);
}

// Calls f with null pointers of the types of x and of the weights.
template <class T, class F>
SSD_ALWAYS_INLINE void with_weights(const Linear& product, F f) {
  T* x = nullptr;
  if (product.scale) return f(x, static_cast<Int8*>(nullptr));
  f(x, x);
}

template <class F>
SSD_ALWAYS_INLINE void with_types(const Linear& product, F f) {
  switch (product.dtype) {
    case kFloat32:
      return with_weights<float>(product, f);
    case kBFloat16:
      return with_weights<BFloat16>(product, f);
    case kFloat16:
      return with_weights<Float16>(product, f);
  }
}

template <class P>
using Pointed = std::remove_pointer_t<P>;

void stage(const Linear& product, int32_t first, int32_t rows, float* staged, float* row) {
  with_types(product, [&](auto* x, auto* w) {
    using T = Pointed<decltype(x)>;
    stage_rows<T, Pointed<decltype(w)>>(product, first, rows, staged, row);
  });
}

void pieces(const Linear& product, int32_t first, int32_t rows, const float* staged, int64_t begin, int64_t end,
            float* buffer) {
  with_types(product, [&](auto* x, auto* w) {
    using T = Pointed<decltype(x)>;
    using W = Pointed<decltype(w)>;
    const auto by = Dot<T, W>::template streams<W>(rows, product.in) ? streamed_pieces<T, W> : tiled_pieces<T, W>;
    by(product, first, rows, staged, begin, end, buffer);
  });
}

}  // namespace

const LinearKernel SSD_ISA::linear_kernel = {stage, pieces};

}  // namespace ssd
