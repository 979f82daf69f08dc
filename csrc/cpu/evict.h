// Choosing the losers among a heavy head's ranks.
#pragma once

#include <cstdint>

#include "common/evict.h"

namespace ssd {

// The rank up to which tokens lose: the (count - keep)-th smallest. `ranks` is reordered.
int64_t losing_rank(int64_t* ranks, int32_t count, int32_t keep);

}  // namespace ssd
