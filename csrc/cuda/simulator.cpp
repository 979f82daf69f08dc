#include "cuda/simulator.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(__x86_64__)
// A switch of stacks in a dozen instructions; swapcontext asks the kernel for signal masks each time.
extern "C" void ssd_switch_stack(void** save, void* load);
asm(R"(
.text
.globl ssd_switch_stack
.hidden ssd_switch_stack
.type ssd_switch_stack, @function
ssd_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ssd_switch_stack, .-ssd_switch_stack
)");
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace ssd::cuda::simulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// Where a flow of control was left.
class Context {
 public:
  void switch_to(Context& other) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, other.stack_, other.stack_bytes_);
#endif
#if defined(__x86_64__)
    ssd_switch_stack(&pointer_, other.pointer_);
#else
    swapcontext(&context_, &other.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void start(char* stack, void (*entry)()) {
    stack_ = stack;
    stack_bytes_ = kStackBytes;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
    *top = nullptr;  // where entry would return to: it never does
    *--top = reinterpret_cast<void*>(entry);
    for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

#if defined(__SANITIZE_ADDRESS__)
  void is_where_we_came_from() {
    __sanitizer_finish_switch_fiber(nullptr, const_cast<const void**>(&scheduler_stack), &scheduler_bytes);
  }
  static const void* scheduler_stack;
  static size_t scheduler_bytes;
  void use_scheduler_stack() {
    stack_ = static_cast<char*>(const_cast<void*>(scheduler_stack));
    stack_bytes_ = scheduler_bytes;
  }
#endif

 private:
#if defined(__x86_64__)
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
};

#if defined(__SANITIZE_ADDRESS__)
const void* Context::scheduler_stack = nullptr;
size_t Context::scheduler_bytes = 0;
#endif

struct Thread {
  Context context;
  bool finished;
  int barriers;
  int waits;
  std::vector<Copy> open;                 // not committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  uint64_t values[2][kWarp];
  Collective kind;
  int arrived;
  int generation;
  uint32_t rank;           // the lowest goes first unless the draw is fair
  std::vector<int> ready;  // threads that can go on
};

struct Machine {
  const std::function<void()>* body;
  Context scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int ready = 0;  // threads, of all warps
  std::vector<int> at_barrier;
  std::unique_ptr<char[]> shared;
  char* stacks = nullptr;
  size_t stack_count = 0;
  int current = 0;
  int block = 0;
  int running = 0;  // threads that have not finished
  bool fair = true;
  Fault fault = kNone;
  int fault_index = 0;
  uint64_t state = 0x9E3779B97F4A7C15u;
  std::string error;

  uint32_t draw(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>((state >> 32) % below);
  }

  void make_ready(int thread) {
    warps[static_cast<size_t>(thread / kWarp)].ready.push_back(thread);
    ++ready;
  }

  // Takes the next of the ready threads: any, or one of the warp that is ahead of all others as far as it can go. A
  // fair draw alone keeps warps so close together that what a slow one would spoil is never spoilt.
  int take_ready() {
    uint32_t at = draw(static_cast<uint32_t>(ready));
    Warp* from = nullptr;
    for (Warp& warp : warps) {
      const uint32_t count = static_cast<uint32_t>(warp.ready.size());
      if (!fair && count > 0 && (!from || warp.rank < from->rank)) from = &warp;
      if (fair && !from && at < count) from = &warp;
      if (fair && !from) at -= count;
    }
    int& taken = from->ready[at % from->ready.size()];
    std::swap(taken, from->ready.back());
    const int thread = from->ready.back();
    from->ready.pop_back();
    --ready;
    return thread;
  }

  void draw_order() {
    fair = draw(2) == 0;
    for (Warp& warp : warps) warp.rank = draw(1u << 30);
  }
};

Machine machine;

void back_to_scheduler() { machine.threads[static_cast<size_t>(machine.current)].context.switch_to(machine.scheduler); }

// The scheduler drops what is left of the launch.
[[noreturn]] void fail(const std::string& what) {
  if (machine.error.empty())
    machine.error =
        what + " (block " + std::to_string(machine.block) + ", thread " + std::to_string(machine.current) + ")";
  back_to_scheduler();
  std::abort();
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  machine.scheduler.is_where_we_came_from();
  machine.scheduler.use_scheduler_stack();
#endif
  (*machine.body)();
  machine.threads[static_cast<size_t>(machine.current)].finished = true;
  --machine.running;
  if (!machine.at_barrier.empty()) fail("a thread left while others wait at a barrier");
  back_to_scheduler();
  std::abort();
}

void land(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  else
    std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
}

void make_stacks(size_t count) {
  if (count <= machine.stack_count) return;
  if (machine.stacks) munmap(machine.stacks, machine.stack_count * kStackBytes);
  machine.stacks = static_cast<char*>(
      mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  machine.stack_count = count;
}

void run_block(int threads) {
  machine.at_barrier.clear();
  machine.ready = 0;
  machine.running = threads;
  for (Warp& warp : machine.warps) {
    warp.arrived = warp.generation = 0;
    warp.ready.clear();
  }
  machine.draw_order();
  for (int index = 0; index < threads; ++index) {
    Thread& thread = machine.threads[static_cast<size_t>(index)];
    thread.finished = false;
    thread.barriers = thread.waits = 0;
    thread.open.clear();
    thread.groups.clear();
    char* stack = machine.stacks + static_cast<size_t>(index) * kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
#endif
    thread.context.start(stack, enter);
    machine.make_ready(index);
  }
  while (machine.ready > 0 && machine.error.empty()) {
    machine.current = machine.take_ready();
    machine.scheduler.switch_to(machine.threads[static_cast<size_t>(machine.current)].context);
  }
  if (machine.error.empty() && machine.running > 0)
    machine.error = "block " + std::to_string(machine.block) + " waits forever: " + std::to_string(machine.running) +
                    " threads left, " + std::to_string(machine.at_barrier.size()) + " of them at a barrier";
}

}  // namespace

int thread_index() { return machine.current; }
int block_index() { return machine.block; }
char* shared_memory() { return machine.shared.get(); }

void sync_block() {
  Thread& thread = machine.threads[static_cast<size_t>(machine.current)];
  if (machine.fault == kSkipBarrier && thread.barriers++ == machine.fault_index) return;
  machine.at_barrier.push_back(machine.current);
  if (static_cast<int>(machine.at_barrier.size()) == static_cast<int>(machine.threads.size())) {
    for (const int thread : machine.at_barrier) machine.make_ready(thread);
    machine.at_barrier.clear();
  } else if (machine.running < static_cast<int>(machine.threads.size())) {
    fail("a barrier that some threads have already left behind");
  }
  back_to_scheduler();
}

const uint64_t* gather(Collective kind, uint64_t value) {
  const int lane = machine.current % kWarp, first = machine.current - lane;
  Warp& warp = machine.warps[static_cast<size_t>(machine.current / kWarp)];
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("lanes of a warp meet in different collectives");
  const int generation = warp.generation;
  warp.values[generation % 2][lane] = value;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
    for (int other = 0; other < kWarp; ++other) machine.make_ready(first + other);
  }
  back_to_scheduler();
  return warp.values[generation % 2];
}

void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % static_cast<uintptr_t>(bytes) ||
      reinterpret_cast<uintptr_t>(global) % static_cast<uintptr_t>(bytes))
    fail("an asynchronous copy of " + std::to_string(bytes) + " bytes that is not aligned");
  const Copy copy{shared, global, bytes};
  if (machine.draw(2))
    land(copy);
  else
    machine.threads[static_cast<size_t>(machine.current)].open.push_back(copy);
}

void commit_copies() {
  Thread& thread = machine.threads[static_cast<size_t>(machine.current)];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void wait_copies(int left) {
  Thread& thread = machine.threads[static_cast<size_t>(machine.current)];
  if (machine.fault == kSkipWait && thread.waits++ == machine.fault_index) return;
  while (static_cast<int>(thread.groups.size()) > left) {
    for (const Copy& copy : thread.groups.front()) land(copy);
    thread.groups.erase(thread.groups.begin());
  }
}

int run(const std::function<void()>& body, int blocks, int threads, int shared_bytes) {
  machine.error.clear();
  if (threads % kWarp) {
    machine.error = "threads must be whole warps, got " + std::to_string(threads);
    return 1;
  }
  machine.body = &body;
  machine.threads.resize(static_cast<size_t>(threads));
  machine.warps.resize(static_cast<size_t>(threads / kWarp));
  make_stacks(static_cast<size_t>(threads));
  std::vector<int> order(static_cast<size_t>(blocks));
  for (int block = 0; block < blocks; ++block) order[static_cast<size_t>(block)] = block;
  for (int block = blocks - 1; block > 0; --block)
    std::swap(order[static_cast<size_t>(block)], order[machine.draw(static_cast<uint32_t>(block + 1))]);
  machine.shared.reset(new char[static_cast<size_t>(shared_bytes)]);
  for (const int block : order) {
    machine.block = block;
    std::memset(machine.shared.get(), 0xFF, static_cast<size_t>(shared_bytes));
    run_block(threads);
    if (!machine.error.empty()) return 1;
  }
  machine.shared.reset();
  return 0;
}

void set_fault(Fault fault, int index) {
  machine.fault = fault;
  machine.fault_index = index;
}
void set_seed(uint64_t seed) { machine.state = (seed + 1) * 0x9E3779B97F4A7C15u | 1; }
const std::string& last_error() { return machine.error; }

}  // namespace ssd::cuda::simulator
