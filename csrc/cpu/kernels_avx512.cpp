#define SSD_ISA avx512
#include "cpu/kernels.h"
#include "cpu/linear_kernels.h"
#include "cpu/read.h"
