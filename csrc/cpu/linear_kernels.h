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

constexpr int kMatrixRows = 4;  // rows of the matrix at a time

// How weights of a type are multiplied: kStep elements at a time, with up to kRows rows of x, staged as `Staged`.
template <class T>
struct Dot;

// Weights that become floats one vector at a time; x is rounded as weights are.
template <class T>
struct OneVector {
  using Staged = float;
  using Loaded = Vec;
  using Sum = Vec;
  static constexpr int kStep = Vec::kWidth;
  static constexpr int kRows = Vec::kWidth == 16 ? 6 : 3;

  SSD_ALWAYS_INLINE static Loaded loaded(const T* w) { return load(w); }
  SSD_ALWAYS_INLINE static Sum none() { return zero(); }
  SSD_ALWAYS_INLINE static Sum add(Loaded w, const float* x, Sum sum) { return fma(w, load(x), sum); }
  SSD_ALWAYS_INLINE static void total_four(const Sum sums[4], float* to) { sum_four(sums, to); }
  SSD_ALWAYS_INLINE static void stage(const float* from, float* to) {
    T rounded[kStep];
    store(rounded, load(from));
    store(to, load(rounded));
  }
};

template <>
struct Dot<float> : OneVector<float> {};
template <>
struct Dot<Float16> : OneVector<Float16> {};

#if defined(__AVX512BF16__)
// In vectors of half the width: on a Zen 4 as many products in a cycle, and with 4 and 8 rows 1.2 and 1.3 times as fast
// as in whole ones.
template <>
struct Dot<BFloat16> {
  using Staged = BFloat16;
  using Loaded = __m256bh;
  using Sum = __m256;
  static constexpr int kStep = 16;
  static constexpr int kRows = 6;

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
#else
template <>
struct Dot<BFloat16> {
  using Staged = float;
  struct Loaded {
    Vec a, b;
  };
  using Sum = Vec;
  static constexpr int kStep = 2 * Vec::kWidth;
  static constexpr int kRows = Vec::kWidth == 16 ? 5 : 3;

  SSD_ALWAYS_INLINE static Loaded loaded(const BFloat16* w) {
    Loaded both;
    load_pair(w, both.a, both.b);
    return both;
  }
  SSD_ALWAYS_INLINE static Sum none() { return zero(); }
  SSD_ALWAYS_INLINE static Sum add(const Loaded& w, const float* x, Sum sum) {
    return fma(w.b, load(x + Vec::kWidth), fma(w.a, load(x), sum));
  }
  SSD_ALWAYS_INLINE static void total_four(const Sum sums[4], float* to) { sum_four(sums, to); }
  // In the lane order of load_pair.
  SSD_ALWAYS_INLINE static void stage(const float* from, float* to) {
    BFloat16 rounded[kStep];
    store(rounded, load(from));
    store(rounded + Vec::kWidth, load(from + Vec::kWidth));
    Vec a, b;
    load_pair(rounded, a, b);
    store(to, a);
    store(to + Vec::kWidth, b);
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

// The rows of x that go through the matrix together, staged.
template <class T>
struct Rows {
  const typename Dot<T>::Staged* x;
  int64_t stride;
  int32_t in;
};

// sums[r * sum_stride + i] = row i of the weights . row r of x, for kMatrixRows rows of weights that lie `apart`.
template <class T, int kCount>
SSD_ALWAYS_INLINE void dot_block(const T* weight, int64_t apart, const Rows<T>& rows, Ahead& ahead, int lines,
                                 float* sums, int64_t sum_stride) {
  constexpr int kStep = Dot<T>::kStep;
  typename Dot<T>::Sum sum[kCount][kMatrixRows];
  for (int r = 0; r < kCount; ++r)
    for (int i = 0; i < kMatrixRows; ++i) sum[r][i] = Dot<T>::none();
  const auto step = [&](const T* w, int64_t w_apart, int32_t k) __attribute__((always_inline)) {
    for (int i = 0; i < kMatrixRows; ++i) {
      const typename Dot<T>::Loaded loaded = Dot<T>::loaded(w + i * w_apart);
      for (int r = 0; r < kCount; ++r) sum[r][i] = Dot<T>::add(loaded, rows.x + r * rows.stride + k, sum[r][i]);
    }
  };
  int32_t k = 0;
  for (; k + kStep <= rows.in; k += kStep) {
    ahead.touch(lines);
    step(weight + k, apart, k);
  }
  if (k < rows.in) {  // what lies behind the last row is not ours to read
    T last[kMatrixRows * kStep];
    std::memset(static_cast<void*>(last), 0, sizeof last);
    for (int i = 0; i < kMatrixRows; ++i)
      std::memcpy(last + i * kStep, weight + i * apart + k, sizeof(T) * (rows.in - k));
    step(last, kStep, k);
  }
  for (int r = 0; r < kCount; ++r) Dot<T>::total_four(sum[r], sums + r * sum_stride);
}

template <class T, int kCount>
SSD_ALWAYS_INLINE void dot_rows(int count, const T* weight, int64_t apart, const Rows<T>& rows, Ahead& ahead, int lines,
                                float* sums, int64_t sum_stride) {
  if (count == kCount) return dot_block<T, kCount>(weight, apart, rows, ahead, lines, sums, sum_stride);
  if constexpr (kCount > 1) dot_rows<T, kCount - 1>(count, weight, apart, rows, ahead, lines, sums, sum_stride);
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

template <class T>
void stage_rows(const Linear& product, int32_t first, int32_t rows, float* staged, float* row) {
  using Staged = typename Dot<T>::Staged;
  const int32_t in = product.in;
  const int64_t stride = staged_stride(in);
  for (int32_t r = 0; r < rows; ++r) {
    const T* x = static_cast<const T*>(product.x) + (first + r) * product.x_stride;
    Vec squares = zero();
    for (int32_t k = 0; k < stride; k += Vec::kWidth) {
      const Vec some = k < in ? load_some(x + k, in - k) : zero();
      squares = fma(some, some, squares);
      store(row + k, some);
    }
    if (product.norm) {
      const Vec inverse = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(in) + product.epsilon));
      for (int32_t k = 0; k < in; k += Vec::kWidth)
        store(row + k, mul(mul(load(row + k), inverse), load_some(static_cast<const T*>(product.norm) + k, in - k)));
    }
    Staged* to = reinterpret_cast<Staged*>(staged) + r * stride;
    for (int32_t k = 0; k < stride; k += Dot<T>::kStep) Dot<T>::stage(row + k, to + k);
  }
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
    if (bias) value = add(value, load_some(bias + output + i, some));
    if (product.silu) value = silu(value);
    if (product.gated) {
      Vec other = load(sums + kLinearOutputs + i);
      if (bias) other = add(other, load_some(bias + product.outputs + output + i, some));
      value = mul(value, other);
    }
    if (product.plus) value = add(load_some(plus + i, some), value);
    store_some(out + i, value, some);
  }
}

template <class T>
void linear_pieces(const Linear& product, int32_t first, int32_t rows, const float* staged, int64_t begin, int64_t end,
                   float* sums) {
  const int64_t in = product.in, stride = staged_stride(product.in);
  const int32_t halves = product.gated ? 2 : 1;
  const int64_t sum_stride = halves * kLinearOutputs;
  const int32_t tiles = (rows + Dot<T>::kRows - 1) / Dot<T>::kRows;
  constexpr int kLines = (kMatrixRows * Dot<T>::kStep * sizeof(T) + 63) / 64;
  const int lines = (kLines + tiles - 1) / tiles;
  const T* weights = static_cast<const T*>(product.weight);
  const T* last = weights + halves * product.outputs * in;

  for (int64_t piece = begin; piece < end; ++piece) {
    const int32_t output = static_cast<int32_t>(piece) * kLinearOutputs;
    const int32_t count = smaller(kLinearOutputs, product.outputs - output);
    for (int32_t half = 0; half < halves; ++half) {
      const T* weight = weights + (static_cast<int64_t>(half) * product.outputs + output) * in;
      for (int32_t i = 0; i < count;) {
        const int32_t block = count - i < kMatrixRows ? 1 : kMatrixRows;
        const T* next = weight + (i + block) * in;
        if (i + block >= count)
          next = half + 1 < halves ? weights + (product.outputs + output) * in
                                   : weights + (static_cast<int64_t>(output) + kLinearOutputs) * in;
        Ahead ahead{reinterpret_cast<const char*>(next),
                    reinterpret_cast<const char*>(next + kMatrixRows * in < last ? next + kMatrixRows * in : last)};
        for (int32_t tile = 0, row = 0; tile < tiles; ++tile) {
          const int32_t size = (rows + tiles - 1 - tile) / tiles;
          const Rows<T> some{reinterpret_cast<const typename Dot<T>::Staged*>(staged) + row * stride, stride,
                             product.in};
          dot_rows<T, Dot<T>::kRows>(size, weight + i * in, block == 1 ? 0 : in, some, ahead, lines,
                                     sums + row * sum_stride + half * kLinearOutputs + i, sum_stride);
          row += size;
        }
        i += block;
      }
    }
    for (int32_t row = 0; row < rows; ++row) finish<T>(product, first + row, output, count, sums + row * sum_stride);
  }
}

// Calls f with a null pointer of the type of x and weights.
template <class F>
SSD_ALWAYS_INLINE void with_type(const Linear& product, F f) {
  switch (product.dtype) {
    case kFloat32:
      return f(static_cast<float*>(nullptr));
    case kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
}

void stage(const Linear& product, int32_t first, int32_t rows, float* staged, float* row) {
  with_type(product,
            [&](auto* type) { stage_rows<std::remove_pointer_t<decltype(type)>>(product, first, rows, staged, row); });
}

void pieces(const Linear& product, int32_t first, int32_t rows, const float* staged, int64_t begin, int64_t end,
            float* sums) {
  with_type(product, [&](auto* type) {
    linear_pieces<std::remove_pointer_t<decltype(type)>>(product, first, rows, staged, begin, end, sums);
  });
}

}  // namespace

const LinearKernel SSD_ISA::linear_kernel = {stage, pieces};

}  // namespace ssd
