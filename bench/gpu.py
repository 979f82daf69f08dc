"""What is measured on a GPU: ``python -m bench.gpu kernel|engine|rivals``, for `make gpu` and tools/gpu_first.py.

Records are appended to a file as soon as there are any, the most telling first, since a process here may be killed. One
that fails is a record that says so, and does not keep the next from being measured.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ssd_kernels import CachePlan, HeadSpec, backends

from . import ceiling, contender, kernel, machine
from .kernel import Options, any_wrong, first_line
from .point import Point
from .records import OK, Record, record
from .terminal import print_records

START = 480  # visual tokens in the cache
DTYPE = "bfloat16"
BUDGETS = (0.2,)
Out = Annotated[Path, typer.Option(help="JSON lines file that records are appended to.")]
Small = Annotated[bool, typer.Option("--small", help="Sizes that a CPU does at once, for trying this out.")]
Backend = Annotated[str, typer.Option(help="cuda or triton.")]
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@dataclass(frozen=True)
class Sizes:
    """What the measurements take.

    Attributes:
        heads, head_dim: of a layer. batches: rows.
        published: rows, heads and tokens for which others have published rates, everything kept.
        model: hidden, intermediate, layers and heads of the decoder. pictures: at once; each takes two rows.
        steps: of the decoder that are timed. repetitions, trials: of the protocol.
    """

    heads: int = 16
    head_dim: int = 128
    batches: tuple[int, ...] = (256, 2, 16, 64)
    published: tuple[tuple[int, int, int], ...] = ((32, 8, 4096), (1, 16, 512))
    model: tuple[int, int, int, int] = (2048, 5632, 24, 16)  # Janus-Pro-1B
    pictures: tuple[int, ...] = (128, 1, 64, 8)
    steps: int = 24
    repetitions: int = 20
    trials: int = 3

    @classmethod
    def chosen(cls, small: bool) -> Sizes:
        """The sizes, or small ones; with these, caches are not cold either."""
        if not small:
            return cls()
        contender.COLD_BYTES, ceiling.LARGE_ON_GPU = 2**18, 2**16
        return cls(heads=2, head_dim=32, batches=(2,), published=((1, 2, 300),), model=(64, 96, 2, 2), pictures=(2, 1),
                   steps=3, repetitions=2, trials=1)


def plans(heads: int) -> Iterator[tuple[str, CachePlan]]:
    """A layer of SSD's two kinds of heads at a fifth of 576 tokens, with a row buffer and without; everything kept."""
    for size, row_buffer in ((91, 24), (115, 0)):
        two = [HeadSpec.window(size) if head % 2 else HeadSpec.heavy(size, recent=size // 2, score="mean")
               for head in range(heads)]
        yield f"20%, two kinds of heads, row buffer {row_buffer}", CachePlan([two], row_buffer=row_buffer)
    yield "everything kept", CachePlan([[HeadSpec.full()] * heads])


def kernel_points(sizes: Sizes) -> Iterator[Point]:
    """What our kernels are measured at."""
    for batch in sizes.batches:
        for name, plan in plans(sizes.heads):
            yield Point.of_plan(plan, 0, name, batch, sizes.head_dim, DTYPE, 24, START, 576)
    for batch, heads, tokens in sizes.published:
        plan = CachePlan([[HeadSpec.full()] * heads])
        label = f"{tokens} tokens, everything kept"
        yield Point.of_plan(plan, 0, label, batch, sizes.head_dim, DTYPE, 0, tokens - 1, tokens)
    for batch in sizes.batches:
        yield Point.of_lengths(batch, sizes.heads, sizes.head_dim, DTYPE)


# Parts of the names of contenders that are measured together. What compiles when it is first used takes long.
RIVALS = {"torch": (("SDPA", "two bmm, every"), ("torch FlashAttention",)),
          "installed": (("FlashInfer",), ("flash-attn",), ("xformers",), ("fla decoding",)),
          "compiled": (("FlexAttention",),)}


def rival_points(sizes: Sizes) -> Iterator[Point]:
    """What rivals are measured at: heads of different lengths, and where others have published rates."""
    middle = 16 if 16 in sizes.batches else sizes.batches[0]
    yield Point.of_lengths(middle, sizes.heads, sizes.head_dim, DTYPE)
    for batch, heads, tokens in sizes.published:
        yield Point.of_lengths(batch, heads, sizes.head_dim, DTYPE, tokens, tokens, "uniform")
    for batch in sizes.batches:
        if batch != middle:
            yield Point.of_lengths(batch, sizes.heads, sizes.head_dim, DTYPE)


@app.command()
def extension() -> None:
    """Fail where the compiled extension does not load or the cuda backend cannot run: it has to be built then."""
    reason = backends.get("cuda").unavailable()
    if reason:
        raise SystemExit(f"error: the cuda backend cannot run here: {reason}")
    print("the extension loads, and the cuda backend can run")


@app.command("kernel")
def measure_kernel(backend: Backend, out: Out, small: Small = False) -> None:
    """One decode step of one layer, and the rates at which memory is read and copied."""
    sizes = Sizes.chosen(small)
    options = Options(device(), (backend,), (True,), only=("ssd_kernels",), repetitions=sizes.repetitions,
                      trials=sizes.trials, launches=False)
    finish([attempt(out, point.to_dict(), f"ssd_kernels {backend}",
                    lambda point=point: kernel.measure(point, options)[1:]) for point in kernel_points(sizes)])


@app.command("rivals")
def measure_rivals(group: Annotated[str, typer.Option(help=f"One of {', '.join(RIVALS)}.")], out: Out,
                   small: Small = False) -> None:
    """Attention over heads of the same lengths by what else is installed."""
    sizes, missing = Sizes.chosen(small), set()
    for point in list(rival_points(sizes))[:1 if group == "compiled" else None]:
        for names in RIVALS[group]:
            if names in missing:
                continue
            options = Options(device(), (), only=names, repetitions=sizes.repetitions, trials=sizes.trials,
                              launches=False)
            found = attempt(out, point.to_dict(), names[0],
                            lambda point=point, options=options: kernel.measure(point, options)[1:])
            if all(line["status"].startswith("not installed") for line in found):
                missing.add(names)


@app.command("engine")
def measure_engine(backend: Backend, out: Out, small: Small = False) -> None:
    """Steps of the whole decoder in Janus-Pro-1B's shape, random weights: everything kept, 20%, 20% with a row buffer.

    Every picture draws from numbers of its own seed.
    """
    from . import decoder, models

    sizes = Sizes.chosen(small)
    model = models.random_model(*sizes.model, torch.bfloat16, device())
    listed = [loop for loop in decoder.loops(model, models.PROMPT, budgets=BUDGETS, backend=backend, seeds=0)
              if loop.features["backend"] is not None]
    done = []
    for pictures in sizes.pictures:
        setting = decoder.Setting("random weights", DTYPE, pictures, sizes.steps, START, sizes.trials)
        for loop in reversed(listed):  # what is new first

            def measure(loop: decoder.Loop = loop, setting: decoder.Setting = setting) -> list[Record]:
                useful = decoder.decode_bytes(model, loop.plan, loop.prompt, 2 * setting.pictures, START)
                return [line | {"useful_bytes": useful} for line in decoder.measure(model, [loop], setting)]

            done.append(attempt(out, setting.point(), f"{loop.name}, {backend}", measure, "step"))
    finish(done)


def device() -> torch.device:
    """The GPU. Raises SystemExit without one."""
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA device")
    return torch.device("cuda")


def attempt(out: Path, point: dict[str, Any], name: str, measure: Callable[[], list[Record]],
            kind: str = "kernel") -> list[Record]:
    """The records of ``measure``, printed and appended to ``out``; if it fails, one that says so."""
    try:
        found = measure()
    except Exception as error:
        traceback.print_exc()
        about = machine.facts(torch.device("cpu"))
        found = [record(kind, about, point, {"name": name, "does": "", "omits": "", "backend": None},
                        status=f"failed: {first_line(error)}", seconds=None)]
    with out.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in found))
    print_records(found)
    if all(line["status"].startswith("failed") for line in found):
        torch.cuda.synchronize()  # a device that is broken says so once, and not at everything that follows
    torch.cuda.empty_cache()
    return found


def finish(done: Sequence[list[Record]]) -> None:
    """Raises SystemExit where one of ours has no number."""
    lines = [line for found in done for line in found]
    failed = [line for line in lines if line["status"] != OK]
    if failed or any_wrong(lines):
        raise SystemExit(f"error: {len(failed)} of {len(lines)} have no number; the first: {failed[0]['status']}")


if __name__ == "__main__":
    app()
