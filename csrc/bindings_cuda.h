// Python bindings of the CUDA backend, and of the tests' executor of its PTX. A header, because reading pybind11's
// own takes seconds: each module does that once.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cuda/decode.h"

namespace ssd {

inline void raise_if_cuda_failed(int error) {
  if (error != 0) throw std::runtime_error(std::string("CUDA: ") + cuda::error_text(error));
}

// Launches go to a device; torch's choice of the current one stays as it was.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device), before_(device) {
    raise_if_cuda_failed(cuda::use_device(device, &before_));
  }
  ~OnDevice() {
    if (before_ != device_) cuda::use_device(before_, &device_);
  }

 private:
  int device_, before_;
};

class CUDALayer : public BoundLayer {
 public:
  using BoundLayer::BoundLayer;

  void decode(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int32_t query_heads, int64_t q_row_stride,
              int64_t q_head_stride, int64_t k_row_stride, int64_t k_head_stride, int64_t v_row_stride,
              int64_t v_head_stride, float scale, uintptr_t cos, uintptr_t sin, uintptr_t partials, uintptr_t logits,
              uintptr_t arrivals, uintptr_t items, int32_t parts, int32_t largest, int device, uintptr_t stream) const {
    const DecodeStep step = decode_step(q, k, v, out, query_heads, q_row_stride, q_head_stride, k_row_stride,
                                        k_head_stride, v_row_stride, v_head_stride, scale, cos, sin);
    const cuda::DecodeParams params =
        cuda::decode_params(layer_, step,
                            {pointer<float>(partials), pointer<float>(logits), pointer<int32_t>(arrivals),
                             pointer<const cuda::LaunchItem>(items), parts, largest});
    const OnDevice on(device);
    raise_if_cuda_failed(cuda::decode(params, pointer<void>(stream)));
  }

  // From a table and to items on the host.
  void list_items(uintptr_t table, bool alternating, uintptr_t items) const {
    cuda::list_items(layer_.shape, pointer<const HeadRange>(table), alternating, pointer<cuda::LaunchItem>(items));
  }

  // prompt_lens and rows are addresses on the device.
  void prefill(uintptr_t k, uintptr_t v, uintptr_t scores, int32_t prompt_stride, int32_t count, uintptr_t prompt_lens,
               uintptr_t rows, int device, uintptr_t stream) const {
    const cuda::PrefillParams params{
        layer_,
        {pointer<const void>(k), pointer<const void>(v), pointer<const float>(scores), prompt_stride, count,
         pointer<const int32_t>(prompt_lens), pointer<const int32_t>(rows)}};
    const OnDevice on(device);
    raise_if_cuda_failed(cuda::prefill(params, pointer<void>(stream)));
  }
};

inline void bind_cuda(pybind11::module_& module) {
  using pybind11::arg;
  bind_layer<CUDALayer>(module, "CUDALayer")
      .def("decode", &CUDALayer::decode)
      .def("prefill", &CUDALayer::prefill)
      .def("list_items", &CUDALayer::list_items);
  module.def("cuda_unavailable", &cuda::unavailable);
  // (blocks, threads, bytes of shared memory) of a decode step.
  module.def(
      "cuda_decode_launch",
      [](int32_t batch, int32_t heads, int32_t query_heads, int32_t head_dim, int32_t parts, int32_t largest,
         bool int8) {
        CacheLayer layer{};
        layer.shape.batch = batch;
        layer.shape.heads = heads;
        layer.shape.head_dim = head_dim;
        layer.kv_format = int8 ? kInt8 : kAuto;
        const cuda::Launch launch =
            cuda::decode_launch(layer, query_heads, {nullptr, nullptr, nullptr, nullptr, parts, largest});
        return pybind11::make_tuple(launch.columns * launch.rows, launch.threads, launch.shared_bytes);
      },
      arg("batch"), arg("heads"), arg("query_heads"), arg("head_dim"), arg("parts"), arg("largest"),
      arg("int8") = false);
  module.def("cuda_blocks_per_multiprocessor", &cuda::blocks_per_multiprocessor, arg("capability"), arg("head_dim"),
             arg("group"), arg("int8") = false);
  module.attr("CUDA_PART_SLOTS") = cuda::kPartSlots;
  module.attr("CUDA_ITEM_WORDS") = sizeof(cuda::LaunchItem) / sizeof(int32_t);
  module.attr("CUDA_MAX_PARTS") = cuda::kMaxParts;
  module.attr("CUDA_MAX_STEPS") = cuda::kMaxSteps;
}

}  // namespace ssd
