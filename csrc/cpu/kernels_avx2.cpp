#define SSD_ISA avx2
#include "cpu/kernels.h"
#include "cpu/linear_kernels.h"
#include "cpu/read.h"
