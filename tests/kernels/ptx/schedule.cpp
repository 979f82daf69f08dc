// Which threads go on, and when: blocks, warps, barriers, and lanes that part and meet.
#include <algorithm>
#include <memory>

#include "step.h"

namespace ptx {
namespace {

constexpr uint32_t kNowhere = UINT32_MAX;
constexpr uint64_t kEnough = 1 << 18;  // instructions of warps, of a launch that has an issue: it may well never end

bool is_collective(Op op) {
  return op == Op::kShuffle || op == Op::kVote || op == Op::kReduce || op == Op::kWarpBarrier || op == Op::kMma ||
         op == Op::kLoadMatrix || op == Op::kStoreMatrix;
}
bool takes_whole_warp(Op op) { return op == Op::kMma || op == Op::kLoadMatrix || op == Op::kStoreMatrix; }

class Grid {
 public:
  Grid(Context& context, const std::vector<Buffer>& buffers)
      : context_(context), f_(context.function), options_(context.options), memory_(context, buffers) {
    const auto volume = [](const std::array<int, 3>& sides) { return sides[0] * sides[1] * sides[2]; };
    threads_ = volume(context.launch.block);
    order_.resize(volume(context.launch.grid));
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<uint32_t>(i);
    if (options_.alive > 1) std::shuffle(order_.begin(), order_.end(), context.random());
  }

  Result run() {
    size_t next = 0;
    while (next < order_.size() || !alive_.empty()) {
      while (next < order_.size() && static_cast<int>(alive_.size()) < options_.alive) admit(order_[next++]);
      size_t index = context_.draw(alive_.size()), tried = 0;
      while (tried < alive_.size() && !slice(*alive_[index])) index = (index + 1) % alive_.size(), ++tried;
      if (tried == alive_.size() || result_.warp_instructions > options_.patience) {
        for (auto& block : alive_) hang(*block);
        break;
      }
      if (result_.warp_instructions > kEnough && !context_.issues().empty()) break;
      if (alive_[index]->live == 0) retire(index);
    }
    for (auto& block : retired_) memory_.flush(*block);
    result_.issues = context_.issues();
    result_.counts = std::move(context_.counts);
    result_.first_copy = context_.first_copy;
    return std::move(result_);
  }

 private:
  void admit(uint32_t id) {
    auto block = std::make_unique<Block>();
    block->id = id;
    block->live = threads_;
    const size_t bytes = (f_.static_shared + 15) / 16 * 16 + context_.launch.shared_bytes;
    const size_t cells = bytes / kCellBytes + 1;
    block->shared.assign(bytes, 0xFF);  // NaN in every format
    block->defined.resize(cells);
    block->copies.resize(cells);
    if (options_.races) block->histories.resize(cells);
    block->threads.resize(threads_);
    block->warps.resize((threads_ + kLanes - 1) / kLanes);
    for (size_t w = 0; w < block->warps.size(); ++w) {
      Warp& warp = block->warps[w];
      warp.index = static_cast<int>(w);
      warp.live = static_cast<uint32_t>(ones(std::min(kLanes, threads_ - warp.index * kLanes)));
      warp.values.resize(static_cast<size_t>(f_.rows()) * kLanes);
      warp.defined.resize(f_.rows());
      if (options_.counts) warp.filled_by.resize(f_.rows());
      for (const auto& [row, value] : f_.constants) {
        std::fill_n(&warp.values[row * kLanes], kLanes, value);
        warp.defined[row] = kAllLanes;
      }
      for (const auto& [row, which] : f_.specials) {
        for (int lane = 0; lane < kLanes; ++lane) warp.values[row * kLanes + lane] = special(which, id, warp, lane);
        warp.defined[row] = kAllLanes;
      }
    }
    ++result_.blocks;
    result_.warps += block->warps.size();
    alive_.push_back(std::move(block));
  }

  uint64_t special(Special which, uint32_t block, const Warp& warp, int lane) const {
    const auto& [width, height, depth] = context_.launch.block;
    const auto& [columns, rows, layers] = context_.launch.grid;
    const auto thread = static_cast<uint32_t>(warp.thread(lane));
    const uint32_t bit = 1u << lane;
    switch (which) {
      case Special::kThreadX:
        return thread % width;
      case Special::kThreadY:
        return thread / width % height;
      case Special::kThreadZ:
        return thread / width / height;
      case Special::kThreadsX:
        return width;
      case Special::kThreadsY:
        return height;
      case Special::kThreadsZ:
        return depth;
      case Special::kBlockX:
        return block % columns;
      case Special::kBlockY:
        return block / columns % rows;
      case Special::kBlockZ:
        return block / columns / rows;
      case Special::kBlocksX:
        return columns;
      case Special::kBlocksY:
        return rows;
      case Special::kBlocksZ:
        return layers;
      case Special::kLane:
        return lane;
      case Special::kWarp:
        return warp.index;
      case Special::kLanesBelow:
        return bit - 1;
      case Special::kLanesUpTo:
        return bit | (bit - 1);
      case Special::kLanesEqual:
        return bit;
      case Special::kLanesFrom:
        return ~(bit - 1);
      default:
        return ~(bit | (bit - 1));
    }
  }

  // A block that has ended. Its stores may still be late, until the launch ends.
  void retire(size_t index) {
    if (options_.weak && context_.draw(2))
      retired_.push_back(std::move(alive_[index]));
    else
      memory_.flush(*alive_[index]);
    alive_.erase(alive_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  // Lets one warp of a block go on for a while; false if none can.
  bool slice(Block& block) {
    const size_t n = block.warps.size(), first = context_.draw(n);
    for (size_t i = 0; i < n; ++i) {
      Warp& warp = block.warps[(first + i) % n];
      if (!warp.runnable()) continue;
      if (options_.weak && context_.draw(4) == 0) memory_.arrive_one(*alive_[context_.draw(alive_.size())]);
      if (options_.copies == Copies::kAnyTime) memory_.arrive_some(block);
      if (options_.independent)
        go_alone(block, warp);
      else
        go_together(block, warp);
      return true;
    }
    return false;
  }

  // Those furthest behind, until they have caught up.
  void go_together(Block& block, Warp& warp) {
    uint32_t pc = kNowhere, mask = 0, limit = kNowhere;
    for_lanes(warp.runnable(), [&](int lane) { pc = std::min(pc, warp.pc[lane]); });
    for_lanes(warp.runnable(), [&](int lane) {
      if (warp.pc[lane] == pc)
        mask |= 1u << lane;
      else
        limit = std::min(limit, warp.pc[lane]);
    });
    const int budget =
        options_.alive > 1 ? 1 + static_cast<int>(context_.draw(size_t{1} << context_.draw(12))) : 1 << 20;
    go(block, warp, mask, pc, limit, budget);
  }

  // Some of those that stand at one instruction, whichever it is.
  void go_alone(Block& block, Warp& warp) {
    int lane = static_cast<int>(context_.draw(kLanes));
    while (!(warp.runnable() >> lane & 1)) lane = (lane + 1) % kLanes;
    const uint32_t pc = warp.pc[lane], chosen = context_.draw(2) ? kAllLanes : context_.draw_lanes();
    uint32_t mask = 0;
    for_lanes(warp.runnable(), [&](int other) {
      if (warp.pc[other] == pc) mask |= 1u << other;
    });
    if (mask & chosen) mask &= chosen;
    go(block, warp, mask, pc, kNowhere, 1 + static_cast<int>(context_.draw(size_t{1} << context_.draw(8))));
  }

  static void stand(Warp& warp, uint32_t lanes, uint32_t pc) {
    for_lanes(lanes, [&](int lane) { warp.pc[lane] = pc; });
  }

  // The lanes whose guard lets them take part.
  uint32_t guarded(Block& block, Warp& warp, const Instruction& in, uint32_t mask) {
    if (in.guard == kNoRow) return mask;
    Step step(context_, memory_, block, warp, in, mask);
    const uint64_t* guard = step.read_row(in.guard, mask);
    step.require_defined("a predicate");
    uint32_t active = 0;
    for_lanes(mask, [&](int lane) { active |= static_cast<uint32_t>((guard[lane] & 1) != in.negated) << lane; });
    return active;
  }

  // Runs lanes that stand at one instruction until they part, wait, reach `limit` or have had their turn.
  void go(Block& block, Warp& warp, uint32_t mask, uint32_t pc, uint32_t limit, int budget) {
    for (; budget > 0 && pc < limit; --budget) {
      const Instruction& in = f_.code[pc];
      context_.pc = static_cast<int>(pc);
      const uint32_t active = guarded(block, warp, in, mask);
      count(warp, in, active);
      if (in.op == Op::kBranch) {
        if (active && active != mask) {
          stand(warp, active, in.target);
          stand(warp, mask & ~active, pc + 1);
          return;
        }
        pc = active ? in.target : pc + 1;
      } else if (in.op == Op::kExit || in.op == Op::kBarrier || is_collective(in.op)) {
        stand(warp, active, pc);
        stand(warp, mask & ~active, pc + 1);
        if (active) stop(block, warp, in, active);
        return;
      } else {
        if (active) execute(block, warp, in, active);
        ++pc;
      }
    }
    stand(warp, mask, pc);
  }

  void count(Warp& warp, const Instruction& in, uint32_t active) {
    ++result_.warp_instructions;
    result_.thread_instructions += __builtin_popcount(active);
    if (!options_.counts) return;
    ++context_.count().warps;
    context_.count().lanes += __builtin_popcount(active);
    count_issue(context_, warp, in);
  }

  void execute(Block& block, Warp& warp, const Instruction& in, uint32_t lanes) {
    if (in.op == Op::kNop) return;
    Step step(context_, memory_, block, warp, in, lanes);
    if (!(compute(step) || convert(step) || manipulate_bits(step) || access_memory(step))) context_.refuse();
  }

  // Lanes that end, or wait for others.
  void stop(Block& block, Warp& warp, const Instruction& in, uint32_t lanes) {
    if (in.op == Op::kExit) {
      leave(block, warp, lanes);
    } else if (in.op == Op::kBarrier) {
      if (in.count > 1) context_.refuse();  // of some threads only
      warp.barred |= lanes;
      block.barred += __builtin_popcount(lanes);
    } else {
      warp.waiting |= lanes;
    }
    open_barrier(block);
    meet(block, warp);
  }

  void leave(Block& block, Warp& warp, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) {
      for (const Copy& copy : block.threads[warp.thread(lane)].copies)
        context_.report("a thread ends while its copy is under way", copy.pc);
    });
    warp.live &= ~lanes;
    block.live -= __builtin_popcount(lanes);
    if (block.barred && block.live) context_.report("a thread ends while others wait at a barrier");
  }

  // Lets all threads on if all that live wait at the block's barrier.
  void open_barrier(Block& block) {
    if (!block.live || block.barred < block.live) return;
    for (Warp& warp : block.warps) {
      uint32_t at = kNowhere;
      for_lanes(warp.barred, [&](int lane) {
        if (at != kNowhere && at != warp.pc[lane])
          context_.report("lanes of a warp wait at different barriers", static_cast<int>(warp.pc[lane]), {},
                          static_cast<int>(at));
        at = warp.pc[lane]++;
      });
      warp.barred = 0;
    }
    block.barred = 0;
    ++result_.barriers;
    if (options_.counts) count_barrier(block);
    Races::barrier(block);
  }

  // Runs instructions of lanes together that all of their mask have reached.
  void meet(Block& block, Warp& warp) {
    for (uint32_t left = warp.waiting; left;) {
      const int lane = __builtin_ctz(left);
      const Instruction& in = f_.code[warp.pc[lane]];
      context_.pc = static_cast<int>(warp.pc[lane]);
      const uint32_t members = members_of(block, warp, in, lane) & warp.live;
      uint32_t here = 0;
      for_lanes(warp.waiting, [&](int other) {
        if (members >> other & 1 && warp.pc[other] == warp.pc[lane]) here |= 1u << other;
      });
      left &= ~(here | 1u << lane);
      if (here != members || !members) continue;
      Step step(context_, memory_, block, warp, in, members);
      exchange(step);
      for_lanes(members, [&](int other) { ++warp.pc[other]; });
      warp.waiting &= ~members;
    }
  }

  uint32_t members_of(Block& block, Warp& warp, const Instruction& in, int lane) {
    if (takes_whole_warp(in.op)) {
      if (warp.live != kAllLanes) context_.report("a lane of the warp has ended");
      return kAllLanes;
    }
    Step step(context_, memory_, block, warp, in, 1u << lane);
    const auto members = static_cast<uint32_t>(step.read(in.count - 1)[lane]);
    step.require_defined("a mask of lanes");
    if (!(members >> lane & 1)) context_.report("a lane is not in its own mask");
    if (members & ~warp.live) context_.report("a lane of the mask has ended");
    return members | 1u << lane;
  }

  void hang(Block& block) {
    for (Warp& warp : block.warps)
      for_lanes(warp.live, [&](int lane) {
        context_.report("waits for ever", static_cast<int>(warp.pc[lane]),
                        "block " + std::to_string(block.id) + ", thread " + std::to_string(warp.thread(lane)));
      });
  }

  Context& context_;
  const Function& f_;
  const Options& options_;
  Memory memory_;
  Result result_;
  std::vector<uint32_t> order_;  // of blocks
  std::vector<std::unique_ptr<Block>> alive_, retired_;
  int threads_ = 0;
};

}  // namespace

Result run(const Function& function, const Launch& launch, const std::vector<Buffer>& buffers, const Options& options) {
  if (static_cast<int>(launch.params.size()) < function.param_bytes) throw std::runtime_error("too few parameters");
  Context context(function, launch, options);
  return Grid(context, buffers).run();
}

}  // namespace ptx
