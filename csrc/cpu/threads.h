// Sharing work out to the threads of the OpenMP runtime that torch has loaded, so that there is one pool of them.
//
// GCC compiles `omp parallel` to GOMP_parallel, which LLVM's and Intel's runtimes export, too. It is called by name:
// clang compiles the pragma to calls of a runtime of its own, which would then lie beside torch's.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#if SSD_KERNELS_HAVE_GOMP
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
#endif

namespace ssd {

// How many of `threads` threads it pays to share reading so many bytes and so many multiplications out to. Waking one
// takes some 30 us where threads sleep between calls, so each gets 50 us of work, at rates that many processors reach.
inline int worthwhile_threads(int64_t bytes, int64_t multiplications, int threads) {
  constexpr int64_t kBytes = 50 * 20000, kMultiplications = 50 * 50000;  // in 50 us
  const int64_t worth = std::max(bytes / kBytes, multiplications / kMultiplications);
  return static_cast<int>(std::clamp<int64_t>(worth, 1, threads));
}

// Calls f() in up to `threads` threads, this one among them, and returns when all have. f must not throw.
template <class F>
void in_parallel(int threads, const F& f) {
#if SSD_KERNELS_HAVE_GOMP
  if (threads > 1) {
    const auto call = [](void* data) { (*static_cast<const F*>(data))(); };
    return GOMP_parallel(call, const_cast<F*>(&f), static_cast<unsigned>(threads), 0);
  }
#endif
  static_cast<void>(threads);
  f();
}

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Pieces [0, count) of work, which threads take in order, several at once: a `share` of what a thread may expect of
// those that are left. So few are long in the beginning, and short ones even out the end. No two are the same thread's
// for sure.
class Pieces {
 public:
  Pieces(int64_t count, int threads, int share) : count_(count), takers_(int64_t{threads} * share) {}

  // Calls f(begin, end) until none is left.
  template <class F>
  void take(F&& f) {
    for (int64_t begin = next_.load(std::memory_order_relaxed); begin < count_;) {
      const int64_t end = begin + std::max<int64_t>(1, (count_ - begin) / takers_);
      if (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      f(begin, end);
      done_.fetch_add(end - begin, std::memory_order_release);
      begin = next_.load(std::memory_order_relaxed);
    }
  }

  // Waits for those that others have taken. They are short, so it spins; but where threads share a processor the others
  // may be waiting for it.
  void wait() const {
    constexpr int kSpins = 200;  // some microseconds
    for (int spin = 0; done_.load(std::memory_order_acquire) < count_; ++spin)
      spin < kSpins ? relax() : std::this_thread::yield();
  }

 private:
  const int64_t count_, takers_;
  std::atomic<int64_t> next_{0}, done_{0};
};

// Calls f(begin, end) for the pieces of [0, count), in up to `threads` threads. f must not throw.
template <class F>
void parallel_for(int threads, int64_t count, int share, const F& f) {
  Pieces pieces(count, threads, share);
  in_parallel(static_cast<int>(std::min<int64_t>(threads, count)), [&] { pieces.take(f); });
}

}  // namespace ssd
