// Products of a few rows with a matrix of weights that is read once, in the order in which it lies in memory. Written
// once and compiled once per instruction set, as kernels.h.
//
// Four rows of the matrix are multiplied with a few rows of x at a time, each of these pairs with a vector of sums of
// its own, while the next four are fetched. A pair's products are added up in the same order whatever else is computed.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/linear.h"
#include "cpu/simd.h"

namespace ssd {
namespace {

// A Dot says how weights are multiplied: kStep at a time, with a tile of up to kRows rows of x, staged as `Staged`.
//
// This one makes floats of weights of any type, one vector at a time.
struct FloatDot {
  using Staged = float;
  using Loaded = Vec;
  using Sum = Vec;
  static constexpr int kStep = Vec::kWidth;
  static constexpr int kRows = Vec::kWidth == 16 ? 6 : 3;
  static constexpr bool kWidens = false;

  template <class W>
  SSD_ALWAYS_INLINE static Loaded loaded(const W* w) {
    return load(w);
  }
  SSD_ALWAYS_INLINE static Sum none() { return zero(); }
  SSD_ALWAYS_INLINE static Sum add(Loaded w, const float* x, Sum sum) { return fma(w, load(x), sum); }
  SSD_ALWAYS_INLINE static void total_four(const Sum sums[4], float* to) { sum_four(sums, to); }
  SSD_ALWAYS_INLINE static void stage(const float* from, float* to) { store(to, load(from)); }
};

// How x of type T is multiplied with weights of type W.
template <class T, class W>
struct Dot : FloatDot {};

#if defined(__AVX512BF16__)
// In vectors of half the width: on a Zen 4 as many products in a cycle, and with 4 and 8 rows 1.2 and 1.3 times as fast
// as in whole ones.
template <>
struct Dot<BFloat16, BFloat16> {
  using Staged = BFloat16;
  using Loaded = __m256bh;
  using Sum = __m256;
  static constexpr int kStep = 16;
  static constexpr int kRows = 6;
  static constexpr bool kWidens = false;

  SSD_ALWAYS_INLINE static Loaded loaded(const BFloat16* w) {
    return (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  }
  SSD_ALWAYS_INLINE static Sum none() { return _mm256_setzero_ps(); }
  SSD_ALWAYS_INLINE static Sum add(Loaded w, const BFloat16* x, Sum sum) { return _mm256_dpbf16_ps(sum, w, loaded(x)); }
  SSD_ALWAYS_INLINE static void total_four(const Sum v[4], float* to) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
  SSD_ALWAYS_INLINE static void stage(const float* from, BFloat16* to) { store(to, load(from)); }
};

// Upper bytes of bfloat16, which holds a signed byte exactly, and lower ones, for magnitudes of bytes.
struct ByteTables {
  uint8_t low[128] = {};   // of m; 128 has that of 0
  uint8_t high[128] = {};  // of 2 m and of 2 m + 1; of 1 for m = 0

  static constexpr int bits(int whole) {
    int exponent = 0;
    while (whole >> exponent > 1) ++exponent;
    return whole == 0 ? 0 : (127 + exponent) << 7 | ((whole << (7 - exponent)) & 0x7F);
  }
  constexpr ByteTables() {
    for (int m = 0; m < 128; ++m) low[m] = static_cast<uint8_t>(bits(m) & 0xFF);
    for (int m = 0; m <= 64; ++m) high[m] = static_cast<uint8_t>(bits(m == 0 ? 1 : 2 * m) >> 8);
  }
};
alignas(64) constexpr ByteTables kByteTables;

// Bytes become bfloat16 by two look-ups: with 2 rows that takes 0.8 times as long as the fastest way by floats. For
// several tiles they are widened once.
template <>
struct Dot<BFloat16, Int8> {
  using Staged = BFloat16;
  struct Loaded {
    __m512bh a, b;
  };
  using Sum = __m512;
  static constexpr int kStep = 64;
  static constexpr int kRows = 6;
  static constexpr bool kWidens = true;

  SSD_ALWAYS_INLINE static __m512i bits(const void* p) { return _mm512_loadu_si512(p); }
  // a: the first eight of every 16 weights; b: the others.
  SSD_ALWAYS_INLINE static Loaded loaded(const Int8* w) {
    const __m512i value = bits(w), size = _mm512_abs_epi8(value);
    const __m512i low = _mm512_permutex2var_epi8(bits(kByteTables.low), size, bits(kByteTables.low + 64));
    const __m512i high = _mm512_maskz_permutex2var_epi8(_mm512_test_epi8_mask(value, value), bits(kByteTables.high),
                                                        _mm512_srli_epi16(size, 1), bits(kByteTables.high + 64));
    const __m512i sign = _mm512_and_si512(value, _mm512_set1_epi8(-128));
    const __m512i signed_high = _mm512_or_si512(high, sign);
    return {(__m512bh)_mm512_unpacklo_epi8(low, signed_high), (__m512bh)_mm512_unpackhi_epi8(low, signed_high)};
  }
  SSD_ALWAYS_INLINE static Loaded loaded(const BFloat16* w) { return {(__m512bh)bits(w), (__m512bh)bits(w + 32)}; }
  SSD_ALWAYS_INLINE static void widen(const Int8* from, BFloat16* to) {
    const Loaded both = loaded(from);
    _mm512_storeu_si512(to, (__m512i)both.a);
    _mm512_storeu_si512(to + 32, (__m512i)both.b);
  }
  SSD_ALWAYS_INLINE static Sum none() { return _mm512_setzero_ps(); }
  SSD_ALWAYS_INLINE static Sum add(Loaded w, const BFloat16* x, Sum sum) {
    const Loaded both = loaded(x);
    return _mm512_dpbf16_ps(_mm512_dpbf16_ps(sum, w.a, both.a), w.b, both.b);
  }
  SSD_ALWAYS_INLINE static void total_four(const Sum v[4], float* to) {
    const Vec sums[4] = {{v[0]}, {v[1]}, {v[2]}, {v[3]}};
    sum_four(sums, to);
  }
  SSD_ALWAYS_INLINE static void stage(const float* from, BFloat16* to) {
    for (int i = 0; i < 4; ++i) {
      BFloat16 some[16];
      store(some, load(from + 16 * i));
      std::memcpy(to + 8 * i, some, sizeof some / 2);
      std::memcpy(to + 32 + 8 * i, some + 8, sizeof some / 2);
    }
  }
};
#endif

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

// A tile, staged: kStep elements of each row in turn, then the next ones.
template <class D>
struct Tile {
  const typename D::Staged* x;
  int32_t in;
};

// sums[r * sum_stride + i] = row i of the weights . row r of x, for kLinearBlock rows of weights that lie `apart`.
template <class D, class W, int kCount>
SSD_ALWAYS_INLINE void dot_block(const W* weight, int64_t apart, const Tile<D>& tile, Ahead& ahead, int lines,
                                 float* sums, int64_t sum_stride) {
  constexpr int kStep = D::kStep;
  typename D::Sum sum[kCount][kLinearBlock];
  for (int r = 0; r < kCount; ++r)
    for (int i = 0; i < kLinearBlock; ++i) sum[r][i] = D::none();
  const auto step = [&](const W* w, int64_t w_apart, int32_t k) __attribute__((always_inline)) {
    const typename D::Staged* x = tile.x + static_cast<int64_t>(k) * kCount;
    for (int i = 0; i < kLinearBlock; ++i) {
      const typename D::Loaded loaded = D::loaded(w + i * w_apart);
      for (int r = 0; r < kCount; ++r) sum[r][i] = D::add(loaded, x + r * kStep, sum[r][i]);
    }
  };
  int32_t k = 0;
  for (; k + kStep <= tile.in; k += kStep) {
    ahead.touch(lines);
    step(weight + k, apart, k);
  }
  if (k < tile.in) {  // what lies behind the last row is not ours to read
    W last[kLinearBlock * kStep];
    std::memset(static_cast<void*>(last), 0, sizeof last);
    for (int i = 0; i < kLinearBlock; ++i)
      std::memcpy(last + i * kStep, weight + i * apart + k, sizeof(W) * (tile.in - k));
    step(last, kStep, k);
  }
  for (int r = 0; r < kCount; ++r) D::total_four(sum[r], sums + r * sum_stride);
}

template <class D, class W, int kCount = D::kRows>
SSD_ALWAYS_INLINE void dot_rows(int count, const W* weight, int64_t apart, const Tile<D>& tile, Ahead& ahead, int lines,
                                float* sums, int64_t sum_stride) {
  if (count == kCount) return dot_block<D, W, kCount>(weight, apart, tile, ahead, lines, sums, sum_stride);
  if constexpr (kCount > 1) dot_rows<D, W, kCount - 1>(count, weight, apart, tile, ahead, lines, sums, sum_stride);
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

template <class T, class D>
void stage_rows(const Linear& product, int32_t first, int32_t rows, float* staged, float* row) {
  const int64_t stride = staged_stride(product.in);
  const int32_t tiles = tiles_of<D>(rows);
  const T* x = static_cast<const T*>(product.x) + first * product.x_stride;
  auto* to = reinterpret_cast<typename D::Staged*>(staged);
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const int32_t size = tile_rows(rows, tiles, tile);
    for (int32_t r = 0; r < size; ++r, x += product.x_stride) {
      normed(product, x, row);
      for (int32_t k = 0; k < stride; k += D::kStep) D::stage(row + k, to + int64_t{k} * size + r * D::kStep);
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

// What follows the products, for `count` outputs of a row from `output` on.
template <class T>
SSD_ALWAYS_INLINE void finish(const Linear& product, int32_t row, int32_t output, int32_t count, const float* sums) {
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
      Vec other = load(sums + kLinearOutputs + i);
      if (product.scale) other = mul(other, load_some(product.scale + product.outputs + output + i, some));
      if (bias) other = add(other, load_some(bias + product.outputs + output + i, some));
      value = mul(value, other);
    }
    if (product.plus) value = add(load_some(plus + i, some), value);
    store_some(out + i, value, some);
  }
}

template <class T, class W>
void linear_pieces(const Linear& product, int32_t first, int32_t rows, const float* staged, int64_t begin, int64_t end,
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
        const auto multiply = [&](const auto* block_weights, int64_t apart,
                                  int32_t width) __attribute__((always_inline)) {
          const auto* x = reinterpret_cast<const typename D::Staged*>(staged);
          float* to = sums + half * kLinearOutputs + i;
          for (int32_t tile = 0; tile < tiles; ++tile) {
            const int32_t size = tile_rows(rows, tiles, tile);
            dot_rows<D>(size, block_weights, block == 1 ? 0 : apart, Tile<D>{x, width}, ahead, lines, to, sum_stride);
            x += size * stride;
            to += size * sum_stride;
          }
        };
        if constexpr (D::kWidens) {
          if (tiles > 1) {
            auto* wide = reinterpret_cast<typename D::Staged*>(buffer);
            for (int32_t b = 0; b < block; ++b) widen_row<D>(weight + (i + b) * in, product.in, wide + b * stride);
            multiply(wide, stride, static_cast<int32_t>(stride));  // zeros behind, in the order of a step
          } else {
            multiply(weight + i * in, in, product.in);
          }
        } else {
          multiply(weight + i * in, in, product.in);
        }
        i += block;
      }
    }
    for (int32_t row = 0; row < rows; ++row) finish<T>(product, first + row, output, count, sums + row * sum_stride);
  }
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
    stage_rows<T, Dot<T, Pointed<decltype(w)>>>(product, first, rows, staged, row);
  });
}

void pieces(const Linear& product, int32_t first, int32_t rows, const float* staged, int64_t begin, int64_t end,
            float* buffer) {
  with_types(product, [&](auto* x, auto* w) {
    linear_pieces<Pointed<decltype(x)>, Pointed<decltype(w)>>(product, first, rows, staged, begin, end, buffer);
  });
}

}  // namespace

const LinearKernel SSD_ISA::linear_kernel = {stage, pieces};

}  // namespace ssd
