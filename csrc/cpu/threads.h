// Sharing work out to the threads of the OpenMP runtime that torch has loaded, so that there is one pool of them.
//
// GCC compiles `omp parallel` to GOMP_parallel, which LLVM's and Intel's runtimes export, too. It is called by name:
// clang compiles the pragma to calls of a runtime of its own, which would then lie beside torch's.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

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

// Calls f(begin, end) for the pieces of [0, count), in up to `threads` threads that take them in order. No two pieces
// are the same thread's for sure. f must not throw.
template <class F>
void parallel_for(int threads, int64_t count, int64_t piece, const F& f) {
  struct Shared {
    const F& f;
    const int64_t count, piece;
    std::atomic<int64_t> next{0};

    void work() {
      for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < count;)
        f(begin, std::min(begin + piece, count));
    }
  } shared{f, count, piece};
#if SSD_KERNELS_HAVE_GOMP
  const int64_t pieces = (count + piece - 1) / piece;
  if (threads > 1 && pieces > 1) {
    const auto work = [](void* data) { static_cast<Shared*>(data)->work(); };
    return GOMP_parallel(work, &shared, static_cast<unsigned>(std::min<int64_t>(threads, pieces)), 0);
  }
#endif
  static_cast<void>(threads);
  shared.work();
}

}  // namespace ssd
