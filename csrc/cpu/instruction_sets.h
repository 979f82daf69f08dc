// Which of the compiled instruction sets the CPU kernels use.
#pragma once

#include <vector>

namespace ssd {

// Names of those compiled in, best first; the one in use; and choosing another (false: unknown, or this machine lacks
// it).
std::vector<const char*> instruction_sets();
const char* instruction_set();
bool set_instruction_set(const char* name);

}  // namespace ssd
