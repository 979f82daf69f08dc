// The CUDA backend on the host simulation, as a Python module: the kernels' own sources and bindings, and no GPU.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings_cuda.h"
#include "cuda/decode.h"
#include "cuda/simulator.h"

namespace ssd::cuda {

const char* unavailable() { return nullptr; }
int use_device(int device, int* before) {
  *before = device;
  return 0;
}
const char* error_text(int) { return simulator::last_error().c_str(); }

}  // namespace ssd::cuda

PYBIND11_MODULE(_simulation, module) {
  ssd::bind_cuda(module);
  module.def("set_fault", [](const std::string& kind, int index) {
    using namespace ssd::cuda::simulator;
    set_fault(kind == "barrier" ? kSkipBarrier : kind == "wait" ? kSkipWait : kNone, index);
  });
  module.def("set_seed", &ssd::cuda::simulator::set_seed);
}
