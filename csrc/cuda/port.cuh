// The only door from the kernels to the hardware: PTX and intrinsics. Kernels use nothing else of CUDA.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "cuda/decode.h"

#define SSD_KERNEL(threads, blocks_per_multiprocessor) \
  __global__ static void __launch_bounds__(threads, blocks_per_multiprocessor)
#define SSD_DEVICE __device__ __forceinline__

namespace ssd::cuda {

namespace port {

constexpr int kWarp = 32;
// The compute capability that is compiled for; on the host, where no kernel is, any.
#ifdef __CUDA_ARCH__
constexpr int kCapability = __CUDA_ARCH__ / 10;
#else
constexpr int kCapability = 80;
#endif

SSD_DEVICE int thread_index() {
  const int index = threadIdx.x;
  __builtin_assume(index >= 0);
  return index;
}
SSD_DEVICE int block_column() { return blockIdx.x; }
SSD_DEVICE int block_row() { return blockIdx.y; }
SSD_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
SSD_DEVICE void sync_block() { __syncthreads(); }

SSD_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
SSD_DEVICE int32_t shuffle_xor(int32_t value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
SSD_DEVICE int64_t shuffle_xor(int64_t value, int mask) {
  return __shfl_xor_sync(~0u, static_cast<long long>(value), mask);
}
SSD_DEVICE int32_t shuffle_up(int32_t value, int by) { return __shfl_up_sync(~0u, value, by); }
SSD_DEVICE int32_t shuffle(int32_t value, int source) { return __shfl_sync(~0u, value, source); }
SSD_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(~0u, vote); }

// Asynchronous copies from global to shared memory. A thread sees its own copies after wait_copies<n>, when at most the
// n groups it committed last are under way; other threads see them after a barrier that follows.
// Unless it is wanted, nothing is read, and zeros arrive.
template <int kBytes>
SSD_DEVICE void copy_async(void* shared, const void* global, bool wanted) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(wanted ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes),
                 "r"(wanted ? kBytes : 0)
                 : "memory");
}
template <int kBytes>
SSD_DEVICE void copy_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
}
SSD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
SSD_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// The same pointer, of which the compiler does not know that it is a sum: it would add up the parts at every use.
template <class T>
SSD_DEVICE T* whole(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// What a block has written before the fence is seen by blocks that see what it wrote after.
SSD_DEVICE void fence() { __threadfence(); }
SSD_DEVICE int32_t atomic_add(int32_t* at, int32_t value) { return atomicAdd(at, value); }
// Of words that other blocks change by atomic_add meanwhile: plain accesses would race with that.
SSD_DEVICE int32_t load_relaxed(const int32_t* at) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
SSD_DEVICE void store_relaxed(int32_t* at, int32_t value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
// Past the first-level cache, which other blocks' writes don't reach.
SSD_DEVICE float load_shared_by_blocks(const float* at) { return __ldcg(at); }
SSD_DEVICE int32_t load_shared_by_blocks(const int32_t* at) { return __ldcg(at); }
SSD_DEVICE ChunkOf<16> load_shared_by_blocks(const ChunkOf<16>* at) {
  const uint4 words = __ldcg(reinterpret_cast<const uint4*>(at));
  return {words.x, words.y, words.z, words.w};
}
SSD_DEVICE ChunkOf<8> load_shared_by_blocks(const ChunkOf<8>* at) {
  const uint2 words = __ldcg(reinterpret_cast<const uint2*>(at));
  return {words.x, words.y};
}

// From shared memory at once; `at` is a multiple of kCount floats from its start.
template <int kCount>
SSD_DEVICE void load_floats(const float* at, float to[kCount]) {
  const auto words = *reinterpret_cast<const ChunkOf<4 * kCount>*>(at);
  memcpy(to, &words, sizeof words);
}

// Of what no block of the launch writes, 16 bytes at a time.
SSD_DEVICE LaunchItem load(const LaunchItem* at) {
  static_assert(sizeof(LaunchItem) == 48);
  uint4 words[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) words[i] = __ldg(reinterpret_cast<const uint4*>(at) + i);
  LaunchItem item;
  memcpy(&item, words, sizeof item);
  return item;
}

// 2^x, with an error of 2 units in the last place.
SSD_DEVICE float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
SSD_DEVICE int count_bits(uint32_t x) { return __popc(x); }
SSD_DEVICE int first_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
SSD_DEVICE int32_t bits_of(float x) { return __float_as_int(x); }
SSD_DEVICE float float_of(int32_t bits) { return __int_as_float(bits); }
// The nearest integer, of two equally near ones the even one; 0 for NaN.
SSD_DEVICE int32_t nearest(float x) { return __float2int_rn(x); }
// Bytes of the two, of which `low` has numbers 0 to 3, as the digits of `picks` say.
SSD_DEVICE uint32_t permute(uint32_t low, uint32_t high, uint32_t picks) { return __byte_perm(low, high, picks); }
// Adds the products of their signed bytes to a sum.
SSD_DEVICE int32_t add_products(uint32_t a, uint32_t b, int32_t sum) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}
SSD_DEVICE float to_float(Float16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}
SSD_DEVICE void from_float(float x, Float16* to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }

// Starts a kernel on a stream; returns a cudaError_t. The first time on a device it also asks for what the kernel needs
// of shared memory.
template <auto kKernel, class Params>
int launch(const Launch& launch, void* stream, const Params& params) {
  constexpr int kAll = 99 * 1024;
  static std::atomic<uint64_t> prepared{0};  // a bit per device
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (!(prepared.load() & bit)) {
    if (const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kAll))
      return error;
    if (const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100))
      return error;
    prepared.fetch_or(bit);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kKernel), dim3(launch.columns, launch.rows),
                          dim3(launch.threads), arguments, launch.shared_bytes, static_cast<cudaStream_t>(stream));
}

SSD_DEVICE float to_float(float x) { return x; }
SSD_DEVICE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
SSD_DEVICE void from_float(float x, float* to) { *to = x; }
SSD_DEVICE void from_float(float x, BFloat16* to) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  // Round to nearest even; a NaN stays a NaN even when its payload is all in the dropped half.
  to->bits = static_cast<uint16_t>(x == x ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : 0x7FC0);
}

// The elements of a chunk as floats; element 0 is in the low half of word 0.
SSD_DEVICE void widen(const Chunk& chunk, float to[4], float) { memcpy(to, &chunk, sizeof chunk); }
SSD_DEVICE void widen(const Chunk& chunk, float to[8], BFloat16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = chunk.words[i] << 16, high = chunk.words[i] & 0xFFFF0000u;
    memcpy(to + 2 * i, &low, sizeof low);
    memcpy(to + 2 * i + 1, &high, sizeof high);
  }
}
SSD_DEVICE void widen(const Chunk& chunk, float to[8], Float16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = to_float(Float16{static_cast<uint16_t>(chunk.words[i])});
    to[2 * i + 1] = to_float(Float16{static_cast<uint16_t>(chunk.words[i] >> 16)});
  }
}
// Signed bytes. One that is not negative, below a 23-bit mantissa's exponent, is a float; older devices convert
// integers at a sixteenth of the rate of additions.
template <int kBytes>
SSD_DEVICE void widen(const ChunkOf<kBytes>& chunk, float to[kBytes], Int8) {
  constexpr float kZero = 8388608.0f + 128.0f;
#pragma unroll
  for (int i = 0; i < kBytes; ++i)
    to[i] = float_of(permute(chunk.words[i / 4] ^ 0x80808080u, 0x4B000000u, 0x7440 | i % 4)) - kZero;
}

SSD_DEVICE int warp_index() { return thread_index() / kWarp; }
SSD_DEVICE int lane_index() { return thread_index() % kWarp; }

}  // namespace port
}  // namespace ssd::cuda
