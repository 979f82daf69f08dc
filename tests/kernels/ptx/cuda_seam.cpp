#include "cuda_seam.h"

#include <stdexcept>
#include <type_traits>

#include "cuda/decode.h"

namespace ptx {

Kernels& kernels() {
  static Kernels kernels;
  return kernels;
}

}  // namespace ptx

namespace ssd::cuda {
namespace {

std::string last_error;

uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

template <class Params>
std::vector<uint8_t> bytes_of(const Params& params) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&params);
  return {bytes, bytes + sizeof params};
}

std::vector<ptx::Buffer> layer_buffers(const CacheLayer& layer) {
  const LayerShape& s = layer.shape;
  const uint64_t slots = static_cast<uint64_t>(s.batch) * s.slots, slab = slots * s.head_dim * stored_size(layer);
  const uint64_t scored = sizeof(float) * s.batch * s.scored_slots;
  const uint64_t prompt_slots = static_cast<uint64_t>(s.shared_prompts) * s.heads * s.max_prompt;
  const uint64_t prompts = prompt_slots * s.head_dim * stored_size(layer);
  return {{address(layer.keys), slab, "keys"},
          {address(layer.values), slab, "values"},
          {address(layer.scores), scored, "scores"},
          {address(layer.positions), scored, "positions"},
          {address(layer.cursors), sizeof(Cursor) * s.batch, "cursors"},
          {address(layer.heads), sizeof(HeadRange) * s.heads, "head table", true, false},
          {address(layer.pinned), sizeof(int32_t) * s.heads * pin_words(s), "pinned", true, false},
          {address(layer.prompt_keys), prompts, "prompt_keys", true, false},
          {address(layer.prompt_values), prompts, "prompt_values", true, false},
          {address(layer.prompt_of), s.shared_prompts ? sizeof(int32_t) * s.batch : 0, "prompt_of", true, false},
          {address(layer.key_scales), sizeof(float) * slots, "key_scales"},
          {address(layer.value_scales), sizeof(float) * slots, "value_scales"},
          {address(layer.prompt_key_scales), sizeof(float) * prompt_slots, "prompt_key_scales", true, false},
          {address(layer.prompt_value_scales), sizeof(float) * prompt_slots, "prompt_value_scales", true, false}};
}

std::vector<ptx::Buffer> decode_buffers(const DecodeParams& params) {
  const LayerShape& s = params.layer.shape;
  const DecodeStep& step = params.step;
  const Workspace& w = params.workspace;
  const uint64_t item = item_size(params.layer.dtype), floats = sizeof(float), group = step.query_heads / s.heads;
  const auto extent = [&](int64_t row, int64_t head, int heads) {
    return item * ((s.batch - 1) * row + (heads - 1) * head + s.head_dim);
  };
  const uint64_t angles = floats * (s.max_prompt + s.num_visual_tokens) * (s.head_dim / 2);
  std::vector<ptx::Buffer> buffers = layer_buffers(params.layer);
  buffers.insert(buffers.end(),
                 {{address(step.q), extent(step.q_row_stride, step.q_head_stride, step.query_heads), "q", true, false},
                  {address(step.k), extent(step.k_row_stride, step.k_head_stride, s.heads), "k", true, false},
                  {address(step.v), extent(step.v_row_stride, step.v_head_stride, s.heads), "v", true, false},
                  {address(step.cos), angles, "cos", true, false},
                  {address(step.sin), angles, "sin", true, false},
                  {address(step.out), item * s.batch * step.query_heads * s.head_dim, "out", false},
                  {address(w.partials), floats * s.batch * w.parts * group * (s.head_dim + 2), "partials", false},
                  {address(w.logits), floats * s.batch * group * s.scored_slots, "logits", false},
                  {address(w.arrivals), sizeof(int32_t) * s.batch * s.heads, "arrivals"},
                  {address(w.items), sizeof(LaunchItem) * w.parts, "launch items", true, false}});
  return buffers;
}

int start(const std::string& module, const std::string& kernel, const Launch& l, std::vector<uint8_t> params,
          std::vector<ptx::Buffer> buffers) {
  try {
    const ptx::Launch launch{{l.columns, l.rows, 1}, {l.threads, 1, 1}, l.shared_bytes, std::move(params), false};
    ptx::kernels().launch(ptx::kernels().find(module, kernel), launch, std::move(buffers));
    return 0;
  } catch (const std::runtime_error& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace

const char* unavailable() { return nullptr; }
int use_device(int device, int* before) {
  *before = device;
  return 0;
}
const char* error_text(int) { return last_error.c_str(); }

// Names as the compiler mangles them; modules are named after the sources.
template <class T, int kDim>
int start_decode(const DecodeParams& params, const Launch& launch, void*) {
  constexpr bool kIsFloat = std::is_same_v<T, float>, kIsBFloat16 = std::is_same_v<T, BFloat16>;
  constexpr bool kIsInt8 = std::is_same_v<T, Int8>;
  const char* type = kIsFloat ? "f" : kIsBFloat16 ? "NS0_8BFloat16E" : kIsInt8 ? "NS0_4Int8E" : "NS0_7Float16E";
  const char* module = kIsFloat ? "decode_f32" : kIsBFloat16 ? "decode_bf16" : kIsInt8 ? "decode_i8" : "decode_f16";
  const int group = params.step.query_heads == params.layer.shape.heads ? 1 : kGroupBlock;
  return start(module,
               std::string("decode_kernelI") + type + "Li" + std::to_string(kDim) + "ELi" + std::to_string(group) + "E",
               launch, bytes_of(params), decode_buffers(params));
}
template int start_decode<float, 0>(const DecodeParams&, const Launch&, void*);
template int start_decode<float, 64>(const DecodeParams&, const Launch&, void*);
template int start_decode<float, 128>(const DecodeParams&, const Launch&, void*);
template int start_decode<BFloat16, 0>(const DecodeParams&, const Launch&, void*);
template int start_decode<BFloat16, 64>(const DecodeParams&, const Launch&, void*);
template int start_decode<BFloat16, 128>(const DecodeParams&, const Launch&, void*);
template int start_decode<Float16, 0>(const DecodeParams&, const Launch&, void*);
template int start_decode<Float16, 64>(const DecodeParams&, const Launch&, void*);
template int start_decode<Float16, 128>(const DecodeParams&, const Launch&, void*);
template int start_decode<Int8, 0>(const DecodeParams&, const Launch&, void*);
template int start_decode<Int8, 64>(const DecodeParams&, const Launch&, void*);
template int start_decode<Int8, 128>(const DecodeParams&, const Launch&, void*);

int start_prefill(const PrefillParams& params, const Launch& launch, void*) {
  const LayerShape& s = params.layer.shape;
  const Prefill& p = params.prompts;
  const uint64_t tokens = static_cast<uint64_t>(p.count) * s.heads * p.prompt_stride;
  const uint64_t bytes = tokens * s.head_dim * item_size(params.layer.dtype);
  std::vector<ptx::Buffer> buffers = layer_buffers(params.layer);
  buffers.insert(buffers.end(), {{address(p.k), bytes, "k", true, false},
                                 {address(p.v), bytes, "v", true, false},
                                 {address(p.scores), sizeof(float) * tokens, "given scores", true, false},
                                 {address(p.prompt_lens), sizeof(int32_t) * p.count, "prompt_lens", true, false},
                                 {address(p.rows), sizeof(int32_t) * p.count, "rows", true, false}});
  return start("prefill", "prefill_kernel", launch, bytes_of(params), std::move(buffers));
}

}  // namespace ssd::cuda
