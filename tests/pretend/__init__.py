"""A pretended machine with CUDA devices: real values, CUDA's rules, no GPU.

Tensors on its devices hold their values in memory of the CPU and compute with torch's CPU kernels, so that results can
be compared; what they refuse and what they wait for is as on a GPU. Beside that:

- operations, host reads and copies are logged (`Machine.log`) with the place in the code that asked for them;
- streams, events and CUDA graphs: what is launched while its stream is captured is recorded, computed again at every
  replay, and has no effect before; what CUDA forbids in a capture fails, and the capture with it;
- memory is counted, and can be made scarce;
- the ``triton`` and ``cuda`` backends run with their own host code; in the place of their kernels the CPU's compute.

Time means nothing here, and what a kernel does on a GPU is not tested by it (tests/kernels/ptx does that). A machine is
there for a block of code (`pretended`), for the rest of a process (`install`), or for a script and the processes that
it starts: ``python -m tests.pretend [--devices N] SCRIPT ARGS`` from the root of the repository.
"""

from .cuda import install, pretended
from .machine import Event, Machine
from .tensor import Pretended

__all__ = ["Event", "Machine", "Pretended", "install", "pretended"]
