// Python bindings: integers become pointers and structs, refusals become exceptions.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/decode.h"
#include "cpu/instruction_sets.h"
#include "cpu/layers.h"
#include "cpu/linear.h"
#include "cpu/threads.h"
#if SSD_KERNELS_HAVE_CUDA
#include "bindings_cuda.h"
#endif

namespace py = pybind11;

namespace {

using ssd::pointer;

void raise_if_refused(const ssd::Error& error, const ssd::LayerShape& shape) {
  const std::string index = std::to_string(error.index), value = std::to_string(error.value);
  switch (error.code) {
    case ssd::Error::kNone:
      return;
    case ssd::Error::kTable:
      throw std::invalid_argument("table row " + index + " does not describe a range that fits the slab and its head");
    case ssd::Error::kPromptLen:
      throw std::invalid_argument("prompt_len of row " + index + " must be within 0 .. " +
                                  std::to_string(shape.max_prompt) + ", got " + value);
    case ssd::Error::kPrompt:
      throw std::invalid_argument("prompt_of of row " + index + " must be within 0 .. " +
                                  std::to_string(shape.shared_prompts - 1) + ", got " + value);
    case ssd::Error::kStep:
      throw std::invalid_argument("row " + index + " has taken " + value +
                                  " steps; the cache holds num_visual_tokens = " +
                                  std::to_string(shape.num_visual_tokens) + ". Call prefill or reset to start over");
  }
}

class Layer : public ssd::BoundLayer {
 public:
  template <class... Arguments>
  explicit Layer(Arguments... arguments) : BoundLayer(arguments...) {
    const int32_t head_dim = layer_.shape.head_dim;
    if (head_dim % 8 || head_dim < 32 || head_dim > ssd::kMaxHeadDim)
      throw std::invalid_argument("head_dim must be a multiple of 8 within 32 .. " + std::to_string(ssd::kMaxHeadDim) +
                                  ", got " + std::to_string(head_dim));
    raise_if_refused(ssd::check_table(layer_), layer_.shape);
  }

  void decode(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int32_t query_heads, int64_t q_row_stride,
              int64_t q_head_stride, int64_t k_row_stride, int64_t k_head_stride, int64_t v_row_stride,
              int64_t v_head_stride, float scale, uintptr_t cos, uintptr_t sin, int threads) const {
    const ssd::DecodeStep step = ssd::decode_step(q, k, v, out, query_heads, q_row_stride, q_head_stride, k_row_stride,
                                                  k_head_stride, v_row_stride, v_head_stride, scale, cos, sin);
    ssd::Error error;
    {
      py::gil_scoped_release unlocked;
      error = ssd::decode(layer_, step, threads);
    }
    raise_if_refused(error, layer_.shape);
  }

  const ssd::CacheLayer& layer() const { return layer_; }

  int decode_threads(int32_t query_heads, int threads) const {
    return ssd::decode_threads(layer_, query_heads, threads);
  }

  void prefill(uintptr_t k, uintptr_t v, uintptr_t scores, int32_t prompt_stride,
               const std::vector<int32_t>& prompt_lens, const std::vector<int32_t>& rows, int threads) const {
    const ssd::Prefill prompts{pointer<const void>(k),
                               pointer<const void>(v),
                               pointer<const float>(scores),
                               prompt_stride,
                               static_cast<int32_t>(rows.size()),
                               prompt_lens.data(),
                               rows.data()};
    py::gil_scoped_release unlocked;
    ssd::prefill(layer_, prompts, threads);
  }
};

// A matrix of weights, with what comes before and after a product with it.
class Linear {
 public:
  Linear(int32_t dtype, uintptr_t weight, uintptr_t scale, uintptr_t bias, uintptr_t norm, float epsilon, bool silu,
         bool gated, int32_t in, int32_t outputs)
      : product_{static_cast<ssd::DType>(dtype),
                 nullptr,
                 pointer<const void>(weight),
                 pointer<const float>(scale),
                 pointer<const void>(bias),
                 pointer<const void>(norm),
                 nullptr,
                 nullptr,
                 0,
                 0,
                 epsilon,
                 0,
                 in,
                 outputs,
                 silu,
                 gated} {}

  void run(uintptr_t x, int64_t x_stride, int32_t rows, uintptr_t plus, int64_t plus_stride, uintptr_t out,
           int threads) const {
    ssd::Linear product = product_;
    product.x = pointer<const void>(x);
    product.x_stride = x_stride;
    product.rows = rows;
    product.plus = pointer<const void>(plus);
    product.plus_stride = plus_stride;
    product.out = pointer<void>(out);
    py::gil_scoped_release unlocked;
    ssd::linear(product, threads);
  }

  const ssd::Linear& product() const { return product_; }

 private:
  ssd::Linear product_;
};

// Decoder layers over one token of every row.
class Layers {
 public:
  void add(const Linear& qkv, const Linear& out, const Linear& gated, const Linear& down) {
    layers_.push_back({qkv.product(), out.product(), gated.product(), down.product()});
  }

  // Seconds of products and of attention.
  std::pair<double, double> run(uintptr_t hidden, int32_t rows, const std::vector<std::vector<const Layer*>>& caches,
                                int32_t query_heads, float scale, uintptr_t cos, uintptr_t sin, int threads) const {
    std::vector<ssd::CacheLayers> all;
    for (const auto& cache : caches) {
      all.emplace_back();
      for (const Layer* layer : cache) all.back().push_back(&layer->layer());
    }
    double seconds[2] = {0.0, 0.0};
    const ssd::LayersStep step{pointer<void>(hidden),     rows,   query_heads, scale, pointer<const float>(cos),
                               pointer<const float>(sin), seconds};
    ssd::Error error;
    const ssd::CacheLayer* refusing = nullptr;
    {
      py::gil_scoped_release unlocked;
      error = ssd::step_layers(layers_, all, step, threads, refusing);
    }
    if (refusing) raise_if_refused(error, refusing->shape);
    return {seconds[0], seconds[1]};
  }

 private:
  std::vector<ssd::DecoderLayer> layers_;
};

py::dict build_info() {
  py::list sets;
  for (const char* name : ssd::instruction_sets()) sets.append(name);
  py::dict info;
  info["compiler"] = SSD_KERNELS_COMPILER;
  info["instruction_sets"] = sets;
  info["instruction_set"] = ssd::instruction_set();
  info["cuda"] = static_cast<bool>(SSD_KERNELS_HAVE_CUDA);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  ssd::bind_layer<Layer>(module, "Layer")
      .def("decode", &Layer::decode)
      .def("decode_threads", &Layer::decode_threads)
      .def("prefill", &Layer::prefill);
  py::class_<Linear>(module, "Linear", py::module_local())
      .def(py::init<int32_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, float, bool, bool, int32_t, int32_t>(),
           py::arg("dtype"), py::arg("weight"), py::arg("scale"), py::arg("bias"), py::arg("norm"), py::arg("epsilon"),
           py::arg("silu"), py::arg("gated"), py::arg("inputs"), py::arg("outputs"))
      .def("run", &Linear::run);
  py::class_<Layers>(module, "Layers", py::module_local())
      .def(py::init<>())
      .def("add", &Layers::add)
      .def("run", &Layers::run);
#if SSD_KERNELS_HAVE_CUDA
  ssd::bind_cuda(module);
#endif
  module.def("build_info", &build_info);
  module.def("worthwhile_threads", &ssd::worthwhile_threads, py::arg("bytes"), py::arg("multiplications"),
             py::arg("threads"));
  module.def("instruction_set", &ssd::instruction_set);
  module.def("set_instruction_set", [](const std::string& name) {
    if (!ssd::set_instruction_set(name.c_str()))
      throw std::invalid_argument("name must be an instruction set compiled in and present on this machine, got " +
                                  name);
  });
  // For measuring: the largest of floats that are read and nothing else.
  module.def(
      "largest",
      [](uintptr_t floats, int64_t count, int streams, int threads) {
        if (count < 1 || streams < 1 || threads < 1)
          throw std::invalid_argument("count, streams and threads must be at least 1");
        py::gil_scoped_release unlocked;
        return ssd::largest(pointer<const float>(floats), count, streams, threads);
      },
      py::arg("floats"), py::arg("count"), py::arg("streams"), py::arg("threads"));
}
