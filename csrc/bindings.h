// What the bindings of all compiled backends share: addresses and numbers become structs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/layer.h"

namespace ssd {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// One layer's tensors, whose addresses never change.
class BoundLayer {
 public:
  BoundLayer(uintptr_t keys, uintptr_t values, uintptr_t scores, uintptr_t positions, uintptr_t cursors,
             uintptr_t table, uintptr_t pinned, int32_t dtype, int32_t batch, int32_t heads, int32_t head_dim,
             int32_t slots, int32_t scored_slots, int32_t max_prompt, int32_t num_visual_tokens, int32_t row_buffer,
             bool keep_prompt, uintptr_t prompt_keys, uintptr_t prompt_values, uintptr_t prompt_of,
             int32_t shared_prompts, bool prompt_scores, uintptr_t key_scales, uintptr_t value_scales,
             uintptr_t prompt_key_scales, uintptr_t prompt_value_scales)
      : layer_{{batch, heads, head_dim, slots, scored_slots, max_prompt, num_visual_tokens, row_buffer, keep_prompt,
                shared_prompts, prompt_scores},
               static_cast<DType>(dtype),
               key_scales ? kInt8 : kAuto,
               pointer<void>(keys),
               pointer<void>(values),
               pointer<float>(scores),
               pointer<int32_t>(positions),
               pointer<Cursor>(cursors),
               pointer<const HeadRange>(table),
               pointer<const int32_t>(pinned),
               pointer<const void>(prompt_keys),
               pointer<const void>(prompt_values),
               pointer<const int32_t>(prompt_of),
               pointer<float>(key_scales),
               pointer<float>(value_scales),
               pointer<const float>(prompt_key_scales),
               pointer<const float>(prompt_value_scales)} {}

 protected:
  CacheLayer layer_;
};

// A Python class for a BoundLayer, with its constructor. Local to its module: the tests' module has the same one.
template <class Layer>
pybind11::class_<Layer> bind_layer(pybind11::module_& module, const char* name) {
  using pybind11::arg;
  return pybind11::class_<Layer>(module, name, pybind11::module_local())
      .def(pybind11::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int32_t, int32_t,
                          int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, bool, uintptr_t, uintptr_t,
                          uintptr_t, int32_t, bool, uintptr_t, uintptr_t, uintptr_t, uintptr_t>(),
           arg("keys"), arg("values"), arg("scores"), arg("positions"), arg("cursors"), arg("table"), arg("pinned"),
           arg("dtype"), arg("batch"), arg("heads"), arg("head_dim"), arg("slots"), arg("scored_slots"),
           arg("max_prompt"), arg("num_visual_tokens"), arg("row_buffer"), arg("keep_prompt"), arg("prompt_keys"),
           arg("prompt_values"), arg("prompt_of"), arg("shared_prompts"), arg("prompt_scores"), arg("key_scales"),
           arg("value_scales"), arg("prompt_key_scales"), arg("prompt_value_scales"));
}

inline DecodeStep decode_step(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int32_t query_heads,
                              int64_t q_row_stride, int64_t q_head_stride, int64_t k_row_stride, int64_t k_head_stride,
                              int64_t v_row_stride, int64_t v_head_stride, float scale, uintptr_t cos, uintptr_t sin) {
  return {pointer<const void>(q),
          pointer<const void>(k),
          pointer<const void>(v),
          pointer<void>(out),
          query_heads,
          q_row_stride,
          q_head_stride,
          k_row_stride,
          k_head_stride,
          v_row_stride,
          v_head_stride,
          scale,
          pointer<const float>(cos),
          pointer<const float>(sin)};
}

}  // namespace ssd
