// Reading memory and nothing else, as fast as the instruction set can: what a decode step is measured against
// (docs/benchmarks.md). Included after kernels.h by each kernels_*.cpp.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/simd.h"

namespace ssd {
namespace SSD_ISA {

// The largest of `count` floats, read in `streams` places at once, a few lines of each in turn: hardware prefetchers
// run ahead in every one of them.
float largest(const float* from, int64_t count, int streams) {
  constexpr int kBlock = 64, kVectors = kBlock / Vec::kWidth;
  const int64_t part = count / streams / kBlock * kBlock;
  Vec top[kVectors];
  for (int j = 0; j < kVectors; ++j) top[j] = broadcast(-INFINITY);
  for (int64_t i = 0; i < part; i += kBlock)
    for (int s = 0; s < streams; ++s) {
      const float* at = from + s * part + i;
      for (int j = 0; j < kVectors; ++j) top[j] = max(top[j], load(at + j * Vec::kWidth));
    }
  for (int j = 1; j < kVectors; ++j) top[0] = max(top[0], top[j]);
  float found = highest(top[0]);
  for (int64_t i = streams * part; i < count; ++i) found = from[i] > found ? from[i] : found;
  return found;
}

}  // namespace SSD_ISA
}  // namespace ssd
