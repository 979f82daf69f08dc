// The instruction sets that are compiled in, and the one in use.
#include "cpu/instruction_sets.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "cpu/threads.h"

namespace ssd {
namespace {

#if SSD_KERNELS_HAVE_X86
bool have_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
// Of processors with bfloat16 instructions only Cooper Lake has no look-ups by byte.
bool have_avx512_bf16() {
  return have_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
// Not every compiler knows "f16c", which every processor with AVX2 has.
bool have_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
bool have_portable() { return true; }

// Best first.
const InstructionSet kSets[] = {
#if SSD_KERNELS_HAVE_X86
    {"avx512_bf16", have_avx512_bf16, avx512::decode_items, avx512::largest, &avx512_bf16::linear_kernel},
    {"avx512", have_avx512, avx512::decode_items, avx512::largest, &avx512::linear_kernel},
    {"avx2", have_avx2, avx2::decode_items, avx2::largest, &avx2::linear_kernel},
#endif
    {"portable", have_portable, portable::decode_items, portable::largest, &portable::linear_kernel},
};

const InstructionSet*& current() {
  static const InstructionSet* chosen =
      std::find_if(std::begin(kSets), std::end(kSets), [](const InstructionSet& set) { return set.present(); });
  return chosen;
}

}  // namespace

const InstructionSet& kernels() { return *current(); }

std::vector<const char*> instruction_sets() {
  std::vector<const char*> names;
  for (const InstructionSet& set : kSets) names.push_back(set.name);
  return names;
}

const char* instruction_set() { return current()->name; }

bool set_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (std::strcmp(set.name, name) || !set.present()) continue;
    current() = &set;
    return true;
  }
  return false;
}

float largest(const float* from, int64_t count, int streams, int threads) {
  const int64_t part = (count + threads - 1) / threads;
  std::vector<float> found(static_cast<size_t>(threads), -INFINITY);
  const auto read = current()->largest;
  parallel_for(threads, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && i * part < count; ++i)
      found[static_cast<size_t>(i)] = read(from + i * part, std::min(part, count - i * part), streams);
  });
  return *std::max_element(found.begin(), found.end());
}

}  // namespace ssd
