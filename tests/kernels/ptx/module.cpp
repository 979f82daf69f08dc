// The executor as a Python module: the CUDA backend's own bindings, and launches of any PTX.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "bindings_cuda.h"
#include "cuda_seam.h"

namespace py = pybind11;

namespace {

void set_options(uint64_t seed, bool independent, int alive, bool weak, int copies, bool races, bool counts) {
  ptx::Options& options = ptx::kernels().options;
  options.seed = seed, options.independent = independent, options.alive = alive, options.weak = weak;
  options.copies = static_cast<ptx::Copies>(copies), options.races = races, options.counts = counts;
}

py::list counted(const ptx::Function& function, const std::vector<ptx::Count>& counts) {
  py::list rows;
  for (size_t pc = 0; pc < counts.size(); ++pc) {
    const ptx::Count& c = counts[pc];
    if (c.warps)
      rows.append(py::make_tuple(function.opcodes[pc], c.warps, c.lanes, c.bytes, c.sectors, c.best_sectors,
                                 c.wavefronts, c.best_wavefronts));
  }
  return rows;
}

// What launches did since the last call. *_before_copy: see ptx::FirstCopy. counts: by kernel, rows (opcode, warps,
// lanes, bytes, sectors, best sectors, wavefronts, best wavefronts) of its instructions.
py::dict take() {
  const ptx::Kernels::Total total = ptx::kernels().take();
  py::dict counts, result;
  for (const auto& [function, list] : total.counts) counts[py::str(function->name)] = counted(*function, list);
  result["launches"] = total.launches;
  result["blocks"] = total.blocks;
  result["warps"] = total.warps;
  result["warp_instructions"] = total.warp_instructions;
  result["thread_instructions"] = total.thread_instructions;
  result["barriers"] = total.barriers;
  result["counts"] = counts;
  result["copying_warps"] = total.first_copy.warps;
  result["instructions_before_copy"] = total.first_copy.instructions;
  result["waits_before_copy"] = total.first_copy.waits;
  return result;
}

using BufferTuple = std::tuple<uint64_t, uint64_t, std::string, bool, bool>;

// grid and block: in x, y and z. shared: bytes. values: of the parameters, by their bits; those missing are 0.
// buffers: (address, bytes, name, defined, writable). replicated: see ptx::Launch.
void launch(const std::string& module, const std::string& kernel, std::array<int, 3> grid, std::array<int, 3> block,
            int shared, const std::vector<uint64_t>& values, const std::vector<BufferTuple>& given, bool replicated) {
  const ptx::Function& function = ptx::kernels().find(module, kernel);
  if (values.size() > function.params.size())
    throw std::invalid_argument(kernel + " takes " + std::to_string(function.params.size()) + " parameters, got " +
                                std::to_string(values.size()));
  std::vector<uint8_t> params(function.param_bytes);
  for (size_t i = 0; i < values.size(); ++i)
    std::memcpy(&params[function.params[i][0]], &values[i], function.params[i][1]);
  std::vector<ptx::Buffer> buffers;
  for (const auto& [base, bytes, name, defined, writable] : given)
    buffers.push_back({base, bytes, name, defined, writable});
  ptx::kernels().launch(function, {grid, block, shared, std::move(params), replicated}, std::move(buffers));
}

}  // namespace

PYBIND11_MODULE(_ptx, module) {
  using py::arg;
  ssd::bind_cuda(module);
  module.def("set_options", &set_options, py::kw_only(), arg("seed"), arg("independent"), arg("alive"), arg("weak"),
             arg("copies"), arg("races"), arg("counts"));
  module.def("load", [](const std::string& name, const std::string& text) { ptx::kernels().load(name, text); });
  module.def("take", &take);
  module.def("launch", &launch);
}
