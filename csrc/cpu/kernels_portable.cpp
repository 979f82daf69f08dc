#define SSD_ISA portable
#include "cpu/kernels.h"
