// The CUDA backend on the executor: csrc/cuda/decode.h is the seam. Its host side compiles as it is, and what starts a
// kernel runs PTX.
#pragma once

#include "kernels.h"

namespace ptx {

// All of the process: launch.cpp knows no other place to look for them.
Kernels& kernels();

}  // namespace ptx
