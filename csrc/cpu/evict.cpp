#include "cpu/evict.h"

#include <algorithm>

namespace ssd {

int64_t losing_rank(int64_t* ranks, int32_t count, int32_t keep) {
  int64_t* last_loser = ranks + (count - keep - 1);
  std::nth_element(ranks, last_loser, ranks + count);
  return *last_loser;
}

}  // namespace ssd
