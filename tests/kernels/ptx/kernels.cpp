#include "kernels.h"

#include <algorithm>
#include <stdexcept>

namespace ptx {
namespace {

constexpr size_t kShown = 8;  // issues of a launch

// Views of one tensor become one buffer.
std::vector<Buffer> merged(std::vector<Buffer> buffers) {
  std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.base < b.base; });
  std::vector<Buffer> result;
  for (Buffer& buffer : buffers) {
    if (!buffer.base || !buffer.bytes) continue;
    if (result.empty() || buffer.base >= result.back().base + result.back().bytes) {
      result.push_back(std::move(buffer));
      continue;
    }
    Buffer& last = result.back();
    last.bytes = std::max(last.base + last.bytes, buffer.base + buffer.bytes) - last.base;
    last.name += " and " + buffer.name;
    last.writable |= buffer.writable;
    last.defined &= buffer.defined;
  }
  return result;
}

std::string told(const Function& function, const std::vector<Issue>& issues) {
  std::string text = function.name + ":";
  for (size_t i = 0; i < std::min(issues.size(), kShown); ++i)
    text += "\n  " + issues[i].kind + " (" + std::to_string(issues[i].count) + " times), " + issues[i].text;
  if (issues.size() > kShown) text += "\n  and " + std::to_string(issues.size() - kShown) + " more";
  return text;
}

}  // namespace

Function& Kernels::find(const std::string& module, const std::string& part) {
  const auto it = modules_.find(module);
  if (it == modules_.end()) throw std::runtime_error("no module " + module + " has been loaded");
  for (auto& [name, function] : it->second)
    if (name.find(part) != std::string::npos) return function;
  throw std::runtime_error("module " + module + " has no kernel " + part);
}

void Kernels::launch(const Function& function, const Launch& launch, std::vector<Buffer> buffers) {
  const Result result = run(function, launch, merged(std::move(buffers)), options);
  ++options.seed;
  add(function, result);
  if (!result.issues.empty()) throw std::runtime_error(told(function, result.issues));
}

void Kernels::add(const Function& function, const Result& result) {
  ++total_.launches;
  total_.blocks += result.blocks;
  total_.warps += result.warps;
  total_.warp_instructions += result.warp_instructions;
  total_.thread_instructions += result.thread_instructions;
  total_.barriers += result.barriers;
  if (!options.counts) return;
  total_.first_copy.warps += result.first_copy.warps;
  total_.first_copy.instructions += result.first_copy.instructions;
  total_.first_copy.waits += result.first_copy.waits;
  std::vector<Count>& counts = total_.counts[&function];
  counts.resize(result.counts.size());
  for (size_t i = 0; i < counts.size(); ++i) {
    Count& sum = counts[i];
    const Count& more = result.counts[i];
    sum.warps += more.warps, sum.lanes += more.lanes, sum.bytes += more.bytes;
    sum.sectors += more.sectors, sum.best_sectors += more.best_sectors;
    sum.wavefronts += more.wavefronts, sum.best_wavefronts += more.best_wavefronts;
  }
}

}  // namespace ptx
