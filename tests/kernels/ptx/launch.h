// What a caller gives the executor and gets back.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

// Global memory that a kernel may touch; nothing else exists.
struct Buffer {
  uint64_t base, bytes;
  std::string name;
  bool defined = true;  // else its bytes are undefined until they are written
  bool writable = true;
};

enum class Copies { kAtOnce, kAnyTime, kWhenAwaited };  // when asynchronous copies arrive

struct Options {
  uint64_t seed = 0;
  bool independent = false;  // threads of a warp go on by themselves; else in lockstep where they can
  int alive = 1;             // blocks at once
  bool weak = false;         // plain stores reach other blocks late, and plain loads may be stale
  Copies copies = Copies::kWhenAwaited;
  bool races = true;                      // report accesses that nothing orders
  bool counts = false;                    // fill Result::counts
  uint64_t patience = uint64_t{1} << 24;  // instructions of warps; a launch of more hangs
};

struct Launch {
  std::array<int, 3> grid, block;
  int shared_bytes;
  std::vector<uint8_t> params;
  // Threads may hold copies of one value, as Triton has it, and use only some of them: what a thread reads in global
  // memory while another of its block writes there is undefined, which is reported where it is used.
  bool replicated = false;
};

// What one instruction did. Sectors are of 32 bytes; a wavefront is one pass over the banks of shared memory.
struct Count {
  uint64_t warps = 0, lanes = 0, bytes = 0, sectors = 0, best_sectors = 0, wavefronts = 0, best_wavefronts = 0;
};

// What warps have done when they begin their first copy of 16 bytes, added up over those that copy.
struct FirstCopy {
  uint64_t warps = 0, instructions = 0;
  uint64_t waits = 0;  // for loads from global memory, one after the other; an instruction waits for its operands
};

struct Issue {
  std::string kind, text;
  uint64_t count;
};

struct Result {
  std::vector<Issue> issues;
  std::vector<Count> counts;  // by instruction
  FirstCopy first_copy;       // if counts are asked for
  uint64_t blocks = 0, warps = 0, warp_instructions = 0, thread_instructions = 0, barriers = 0;
};

Result run(const Function& function, const Launch& launch, const std::vector<Buffer>& buffers, const Options& options);

}  // namespace ptx
