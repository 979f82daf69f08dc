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

// What one asynchronous copy moves.
struct alignas(16) Chunk {
  uint32_t words[4];
};

}  // namespace ssd::cuda
