"""What a reader needs to judge a number: machine, driver, versions, commit, load and command line."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import ssd_kernels

ROOT = Path(__file__).resolve().parents[1]
_best = ssd_kernels.info()["extension"].get("instruction_set")  # before anybody chooses another


def facts(device: torch.device) -> dict[str, Any]:
    """Plain values; no host name and no path of this machine."""
    extension = ssd_kernels.info()["extension"]
    about: dict[str, Any] = {
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "instruction_set": extension.get("instruction_set"),
        "forced": extension.get("instruction_set") != _best, "load": load(),
        "python": platform.python_version(), "torch": torch.__version__, "ssd_kernels": ssd_kernels.__version__,
        "commit": commit(), "command": command_line(sys.argv), "device": device.type,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda,
                  "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
        try:
            import triton

            about["triton"] = triton.__version__
        except ImportError:
            about["triton"] = None
    return about


def load() -> float:
    """Processes that ran or waited to run during the last minute, on average."""
    return round(os.getloadavg()[0], 2)


def processor() -> str:
    """The processor's name as Linux has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache  # read once: what is measured is what was there at the start, and results may be tracked files
def commit() -> str | None:
    """The commit this code was checked out from, with ``+`` when tracked files differ from it; None outside git.

    As it was when first asked for in this process, so that a run may rewrite its own tracked results.
    """
    head = _said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head and head + ("+" if changed else "")


def command_line(arguments: list[str]) -> str:
    """The command with the program and every absolute path cut down to its name."""
    return " ".join([Path(arguments[0]).name, *(re.sub(r"(^|=)/\S*/", r"\1", given) for given in arguments[1:])])


def folder_name(about: dict[str, Any]) -> str:
    """Folder of a machine's committed results: processor, cores and instruction set, or the GPU's name.

    ``forced`` is in it where the machine has a better instruction set.
    """
    name = about.get("gpu") or (f"{about['processor']} {about['cores']} cores {about['instruction_set'] or ''} "
                                f"{'forced' if about.get('forced') else ''}")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def reset_peak(device: torch.device) -> None:
    """Start measuring `peak` anew, where the system lets one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak(device: torch.device) -> int | None:
    """Most bytes allocated on a CUDA device, or most memory this process held, since `reset_peak`; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
