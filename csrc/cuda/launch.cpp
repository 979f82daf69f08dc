// The CUDA backend's host side: sizes of launches, and the kernel for a data type and head_dim.
#include <algorithm>
#include <numeric>
#include <vector>

#include "cuda/decode.h"

namespace ssd::cuda {
namespace {

template <class T>
int decode_as(const DecodeParams& params, const Launch& launch, void* stream) {
  switch (params.layer.shape.head_dim) {
    case 64:
      return start_decode<T, 64>(params, launch, stream);
    case 128:
      return start_decode<T, 128>(params, launch, stream);
    default:
      return start_decode<T, 0>(params, launch, stream);
  }
}

template <class T, int kGroup>
int32_t bytes_for(int32_t head_dim, int32_t largest, int32_t group) {
  switch (head_dim) {
    case 64:
      return shared_bytes<T, 64, kGroup>(largest, group);
    case 128:
      return shared_bytes<T, 128, kGroup>(largest, group);
    default:
      return shared_bytes<T, 0, kGroup>(largest, group);
  }
}
// The same for all types but bytes.
template <class T>
int32_t bytes_for(int32_t head_dim, int32_t largest, int32_t group) {
  return group == 1 ? bytes_for<T, 1>(head_dim, largest, group) : bytes_for<T, kGroupBlock>(head_dim, largest, group);
}

}  // namespace

Launch decode_launch(const CacheLayer& layer, int32_t query_heads, const Workspace& workspace) {
  const LayerShape& shape = layer.shape;
  const int32_t group = query_heads / shape.heads;
  const int32_t bytes = layer.kv_format == kInt8 ? bytes_for<Int8>(shape.head_dim, workspace.largest, group)
                                                 : bytes_for<float>(shape.head_dim, workspace.largest, group);
  return {shape.batch, workspace.parts, kThreads, bytes};
}

Launch prefill_launch(const LayerShape& shape, const Prefill& prompts) {
  return {prompts.count * shape.heads, 1, kThreads, 12 * prompts.prompt_stride + kDigitBytes};
}

void list_items(const LayerShape& shape, const HeadRange* table, bool alternating, LaunchItem* items) {
  std::vector<int32_t> order(shape.heads);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return table[a].capacity > table[b].capacity; });
  int32_t rank = 0;
  for (int32_t i = 0; i < shape.heads; ++i) {
    const int32_t head = order[!alternating ? i : i % 2 == 0 ? i / 2 : shape.heads - 1 - i / 2];
    const int32_t first = rank, parts = parts_of(table[head].capacity);
    for (int32_t part = 0; part < parts; ++part)
      items[rank++] = launch_item(shape, table[head], head, part, parts, first);
  }
}

int decode(const DecodeParams& params, void* stream) {
  const Launch launch = decode_launch(params.layer, params.step.query_heads, params.workspace);
  if (launch.columns == 0 || launch.rows == 0) return 0;
  if (params.layer.kv_format == kInt8) return decode_as<Int8>(params, launch, stream);
  switch (params.layer.dtype) {
    case kBFloat16:
      return decode_as<BFloat16>(params, launch, stream);
    case kFloat16:
      return decode_as<Float16>(params, launch, stream);
    default:
      return decode_as<float>(params, launch, stream);
  }
}

int prefill(const PrefillParams& params, void* stream) {
  const Launch launch = prefill_launch(params.layer.shape, params.prompts);
  return launch.columns == 0 ? 0 : start_prefill(params, launch, stream);
}

}  // namespace ssd::cuda
