// The order in which heavy heads lose tokens: docs/specification.md, section 3.4.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/layout.h"

namespace ssd {

constexpr int64_t kProtected = INT64_MAX;

// Sorts by key, and of equal keys by position. Any two numbers may be given; no position is negative unless memory is
// damaged.
SSD_INLINE int64_t ordered_pair(int32_t key, int32_t position) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(key)) << 32 |
                              static_cast<uint32_t>(position));
}

// An integer that sorts like an eviction key, NaN below every number.
SSD_INLINE int32_t ordered_key(float key) {
  key += 0.0f;  // -0 and +0 are equal keys
  int32_t bits;
  memcpy(&bits, &key, sizeof bits);
  const int32_t ordered = bits ^ ((bits >> 31) & INT32_MAX);
  return key == key ? ordered : INT32_MIN;
}

// An integer that sorts like rule 4: first the eviction key, then the position, so that of equal keys the older token
// is the smaller. Positions are distinct, and so are ranks.
SSD_INLINE int64_t eviction_rank(float key, int32_t position) { return ordered_pair(ordered_key(key), position); }

// The same for a pinned token: above every key, infinity included, and below the protected.
SSD_INLINE int64_t pinned_rank(int32_t position) { return ordered_pair(INT32_MAX, position); }

// Decode steps in which a token has been attended to, `steps` being all taken so far: since its own step for a visual
// token, since the first for a prompt token, and at least 1.
SSD_INLINE int32_t attended_steps(int32_t position, int32_t prompt_len, int32_t steps) {
  // Any two numbers may be given.
  const int32_t token = static_cast<int32_t>(static_cast<uint32_t>(position) - static_cast<uint32_t>(prompt_len));
  return larger(steps - larger(token, 0), 1);
}

}  // namespace ssd
