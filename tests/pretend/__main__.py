"""Run a program on the pretended machine, and so every Python process that it starts."""

from __future__ import annotations

import os
import runpy
import sys

from . import guard
from .cuda import environment, install

USAGE = "usage: python -m tests.pretend [--devices N] SCRIPT ARGS, or -m MODULE ARGS, as Python takes them"


def main(arguments: list[str]) -> None:
    devices = 1
    if arguments[:1] == ["--devices"] and len(arguments) > 1:
        devices, arguments = int(arguments[1]), arguments[2:]
    module = arguments[:1] == ["-m"]
    if len(arguments) <= module:
        sys.exit(USAGE)
    if reason := guard.unsupported():
        sys.exit(f"no machine is pretended here: {reason}")
    os.environ.update(environment(devices))
    install(devices)
    sys.argv = arguments[module:]
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
