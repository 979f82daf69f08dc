"""The decode step on a GPU, cold over all layers' caches, against a copy: ``python -m bench.gpu --out DIR``."""

from __future__ import annotations

import csv
import io
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ssd_kernels import CachePlan, CompressedCache, HeadSpec, backends
from ssd_kernels.files import write_atomically
from ssd_kernels.triton.launch import step_bytes

LAYERS, TOKENS, PROMPT = 24, 576, 20
START = 480  # the budget is full from here on, and the timed steps stay before the end
REPETITIONS, TRIALS = 50, 3


@dataclass(frozen=True)
class Line:
    """One row of the table. Times in microseconds per launch (one layer, one step); ``share`` of the copy bandwidth."""

    backend: str
    plan: str
    rows: int
    heads: int
    head_dim: int
    dtype: str
    microseconds: float
    spread: float
    gigabytes_per_second: float
    share: float


def plans(layers: int, heads: int, row_buffer: int = 24) -> Iterator[tuple[str, CachePlan]]:
    """Plans of the table; the two-kind plan holds about 20% of the picture's tokens at its largest."""
    def uniform(spec: HeadSpec, buffer: int) -> CachePlan:
        return CachePlan.uniform(spec, num_layers=layers, num_heads=heads, row_buffer=buffer)

    half = [HeadSpec.window(91) if head % 2 else HeadSpec.heavy(91, recent=45, score="mean") for head in range(heads)]
    yield "20% two kinds, R24", CachePlan([half] * layers, row_buffer=row_buffer)
    yield "20% windows, R0", uniform(HeadSpec.window(115), 0)
    yield "20% heavy, R0", uniform(HeadSpec.heavy(115, recent=57, score="mean"), 0)
    yield "full", uniform(HeadSpec.full(), 0)


def seconds(replay: Callable[[], object], repetitions: int = REPETITIONS) -> float:
    """GPU seconds of one call, of ``repetitions`` in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repetitions):
        replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repetitions


def copy_bandwidth() -> float:
    """Bytes per second of a large device copy, read and written bytes both counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), 10) for _ in range(TRIALS))


def measure(backend: str, name: str, plan: CachePlan, rows: int, head_dim: int, dtype: torch.dtype,
            bandwidth: float) -> Line:
    """Time one step of all layers as a CUDA graph: every layer's cache is cold when its turn comes."""
    heads = plan.num_heads
    cache = CompressedCache(plan, batch_size=rows, num_query_heads=heads, head_dim=head_dim, max_prompt=PROMPT,
                            num_visual_tokens=TOKENS, dtype=dtype, device="cuda", backend=backend)
    q = torch.randn(rows, heads, head_dim, device="cuda").to(dtype)
    for state in cache._layers:
        state.keys.normal_()
        state.values.normal_()
        state.scores.uniform_()
        # Any distinct positions before the present will do.
        state.positions.copy_(torch.arange(state.positions.shape[1], device="cuda").remainder(START))

    def restart() -> None:
        for state in cache._layers:
            state.cursors.copy_(torch.tensor([[PROMPT, START]], device="cuda").expand(rows, 2))

    def step() -> None:
        for layer in range(plan.num_layers):
            cache.decode(layer, q, q, q)

    cache.warmup()
    restart()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(TRIALS):
        restart()
        times.append(seconds(graph.replay) / plan.num_layers)
    steps = range(START, START + REPETITIONS)
    layout = cache._layers[0].layout
    moved = rows * statistics.mean(step_bytes(layout, PROMPT, at, head_dim, dtype.itemsize) for at in steps)
    best = min(times)
    return Line(backend, name, rows, heads, head_dim, str(dtype).removeprefix("torch."), best * 1e6,
                (max(times) - best) * 1e6, moved / best / 1e9, moved / best / bandwidth)


def facts(bandwidth: float) -> dict[str, Any]:
    """Machine, driver, versions and commit."""
    import triton

    def said(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    return {"gpu": torch.cuda.get_device_name(), "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "triton": triton.__version__,
            "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "commit": said("git", "rev-parse", "HEAD"), "copy_bytes_per_second": bandwidth}


def write(lines: list[Line], about: dict[str, Any], out: Path) -> None:
    """``kernel.json`` and ``kernel.csv`` in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    records = [asdict(line) for line in lines]
    text = json.dumps(about | {"lines": records}, indent=1) + "\n"
    write_atomically(out / "kernel.json", lambda file: file.write(text.encode()))
    rows = io.StringIO(newline="")
    table = csv.DictWriter(rows, list(records[0]))
    table.writeheader()
    table.writerows(records)
    write_atomically(out / "kernel.csv", lambda file: file.write(rows.getvalue().encode()))


def main(out: Annotated[Path, typer.Option(help="Folder for kernel.json and kernel.csv.")]) -> None:
    """Time every GPU backend present, and print one table last."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device")
    bandwidth = copy_bandwidth()
    present = [name for name in ("cuda", "triton") if backends.available().get(name, "absent") is None]
    lines = [measure(backend, name, plan, rows, 128, torch.bfloat16, bandwidth)
             for backend in present for rows in (2, 16, 64, 256) for name, plan in plans(LAYERS, 16)
             if rows < 256 or name != "full"]  # 24 full layers of 256 rows would take 60 GB
    write(lines, facts(bandwidth), out)
    from rich.console import Console
    from rich.table import Table

    table = Table("backend", "plan", "rows", "us", "+-", "GB/s", "of copy",
                  title=f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e9:.0f} GB/s, 16 heads x 128, bfloat16")
    for line in lines:
        table.add_row(line.backend, line.plan, str(line.rows), f"{line.microseconds:.1f}", f"{line.spread:.1f}",
                      f"{line.gigabytes_per_second:.0f}", f"{line.share:.0%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
