#define SSD_ISA portable
#include "cpu/kernels.h"
#include "cpu/linear_kernels.h"
#include "cpu/read.h"
