// The kernels that have been loaded, what launches of them did, and how they run.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"

namespace ptx {

class Kernels {
 public:
  Options options;

  void load(const std::string& module, const std::string& text) { modules_[module] = parse(text); }
  // The one function of a module whose name contains `part`. Throws std::runtime_error.
  Function& find(const std::string& module, const std::string& part);

  // Throws std::runtime_error with what was wrong. Every launch has another seed.
  void launch(const Function& function, const Launch& launch, std::vector<Buffer> buffers);

  struct Total {
    uint64_t launches = 0, blocks = 0, warps = 0, warp_instructions = 0, thread_instructions = 0, barriers = 0;
    std::map<const Function*, std::vector<Count>> counts;
    FirstCopy first_copy;
  };
  Total take() { return std::exchange(total_, {}); }

 private:
  void add(const Function& function, const Result& result);

  std::map<std::string, Module> modules_;
  Total total_;
};

}  // namespace ptx
