// The order in which heavy heads lose tokens: SPEC section 3, rule 4.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/layout.h"

namespace ssd {

constexpr int64_t kProtected = INT64_MAX;

// An integer that sorts like rule 4: first the eviction key (NaN below every number), then the position, so that of
// equal keys the older token is the smaller. Positions are distinct, and so are ranks.
SSD_INLINE int64_t eviction_rank(float key, int32_t position) {
  key += 0.0f;  // -0 and +0 are equal keys
  int32_t bits;
  memcpy(&bits, &key, sizeof bits);
  const int32_t ordered = bits ^ ((bits >> 31) & INT32_MAX);
  return static_cast<int64_t>(key == key ? ordered : INT32_MIN) * (int64_t{1} << 32) + position;
}

// The same for a pinned token: above every key, infinity included, and below the protected.
SSD_INLINE int64_t pinned_rank(int32_t position) {
  return static_cast<int64_t>(INT32_MAX) * (int64_t{1} << 32) + position;
}

// Decode steps in which a token has been attended to, `steps` being all taken so far: since its own step for a visual
// token, since the first for a prompt token, and at least 1.
SSD_INLINE int32_t attended_steps(int32_t position, int32_t prompt_len, int32_t steps) {
  // Any two numbers may be given.
  const int32_t token = static_cast<int32_t>(static_cast<uint32_t>(position) - static_cast<uint32_t>(prompt_len));
  return larger(steps - larger(token, 0), 1);
}

}  // namespace ssd
