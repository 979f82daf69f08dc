// What all parts of the executor share during a launch.
#pragma once

#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "launch.h"

namespace ptx {

constexpr uint64_t kSharedWindow = uint64_t{1} << 60;  // where shared memory lies among generic addresses

class Context {
 public:
  Context(const Function& function, const Launch& launch, const Options& options)
      : function(function), launch(launch), options(options), counts(function.code.size()), random_(options.seed) {}

  const Function& function;
  const Launch& launch;
  const Options& options;
  int pc = 0;  // of the instruction that runs
  std::vector<Count> counts;
  FirstCopy first_copy;

  size_t draw(size_t n) { return n < 2 ? 0 : random_() % n; }
  uint32_t draw_lanes() { return static_cast<uint32_t>(random_()) | static_cast<uint32_t>(random_()); }
  std::mt19937_64& random() { return random_; }
  Count& count() { return counts[pc]; }

  // `pc`: the instruction to blame; `other`: what it collides with. Later ones of the same are only counted.
  void report(const std::string& kind, int pc, const std::string& detail = {}, int other = -1) {
    Issue& issue = issues_[{kind, pc, other}];
    if (issue.count++) return;
    issue.kind = kind;
    issue.text = function.where(pc);
    if (other >= 0) issue.text += " against " + function.where(other);
    if (!detail.empty()) issue.text += ": " + detail;
  }
  void report(const std::string& kind, const std::string& detail = {}) { report(kind, pc, detail); }
  [[noreturn]] void refuse() const { throw std::runtime_error("not served: " + function.where(pc)); }

  std::vector<Issue> issues() const {
    std::vector<Issue> all;
    for (const auto& [key, issue] : issues_) all.push_back(issue);
    return all;
  }

 private:
  std::mt19937_64 random_;
  std::map<std::tuple<std::string, int, int>, Issue> issues_;
};

}  // namespace ptx
