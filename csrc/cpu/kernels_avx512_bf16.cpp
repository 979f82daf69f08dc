// Only products of bfloat16, with bfloat16 or bytes, gain from these instructions.
#define SSD_ISA avx512_bf16
#include "cpu/linear_kernels.h"
