// Twins of what orders accesses in port.cuh, without the order: tests call one in the place of the other.
// Loads past the first-level cache have none: they are quicker, and it is fences that order what they read.
namespace ssd::cuda::port::without {

SSD_DEVICE void sync_block() {}
SSD_DEVICE void fence() {}
SSD_DEVICE void commit_copies() {}
template <int>
SSD_DEVICE void wait_copies() {}
template <class T>
SSD_DEVICE T load_relaxed(const T* at) {
  return *at;
}
template <class T>
SSD_DEVICE void store_relaxed(T* at, T value) {
  *at = value;
}
template <class T>
SSD_DEVICE T atomic_add(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}

}  // namespace ssd::cuda::port::without
