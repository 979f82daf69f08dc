// Storage types of the CUDA kernels; arithmetic is float throughout.
#pragma once

#include <cstdint>

namespace ssd::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// A byte of a vector that has a scale: the one type in which q, k, v and the output don't come.
struct Int8 {
  int8_t value;
};

// What one asynchronous copy moves.
template <int kBytes>
struct alignas(kBytes) ChunkOf {
  uint32_t words[kBytes / 4];
};
using Chunk = ChunkOf<16>;

}  // namespace ssd::cuda
