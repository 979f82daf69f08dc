// CUDA's threads, warps, barriers and asynchronous copies on the host, for tests: every thread of a block is a fiber.
//
// A fiber runs until it meets others: at a barrier, or in a warp collective, which both wait for all that take part.
// Who goes on next is drawn at random from a seed, so that what only works in one order fails. Shared memory starts as
// NaN in every block, and asynchronous copies arrive as late as CUDA allows: when somebody waits for them. Blocks run
// one after the other, in random order. What this cannot show: races within a run between two meetings that every order
// of whole runs hides, what the memory model allows beyond that, and time.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>

namespace ssd::cuda::simulator {

enum Collective { kShuffle = 1, kBallot = 2 };

int thread_index();
int block_index();
char* shared_memory();
void sync_block();

// Every lane of the warp gives a value; all of them, by lane, once all have come.
const uint64_t* gather(Collective kind, uint64_t value);

// Null stands for zeros.
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int left);

inline float power_of_two(float x) { return std::exp2(x); }

// Runs `body` once per thread of every block; 0, or 1 after `last_error` has been set.
int run(const std::function<void()>& body, int blocks, int threads, int shared_bytes);

// For tests of the tests: in the launches that follow every thread skips its index-th barrier, or its index-th wait for
// copies, counted from 0.
enum Fault { kNone = 0, kSkipBarrier = 1, kSkipWait = 2 };
void set_fault(Fault fault, int index);

void set_seed(uint64_t seed);
const std::string& last_error();

}  // namespace ssd::cuda::simulator
