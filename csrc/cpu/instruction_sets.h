// Which of the compiled instruction sets the CPU kernels use.
#pragma once

#include <vector>

#include "cpu/decode.h"
#include "cpu/linear.h"

namespace ssd {

struct InstructionSet {
  const char* name;
  bool (*present)();
  void (*decode_items)(const CacheLayer&, const DecodeStep&, const Items&, const Scratch&);
  float (*largest)(const float*, int64_t, int);
  const LinearKernel* linear;
};

// The kernels in use.
const InstructionSet& kernels();

// Names of those compiled in, best first; the one in use; and choosing another (false: unknown, or this machine lacks
// it).
std::vector<const char*> instruction_sets();
const char* instruction_set();
bool set_instruction_set(const char* name);

}  // namespace ssd
