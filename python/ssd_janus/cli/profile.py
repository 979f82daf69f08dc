"""The command ``profile``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ..ranks import Ranks, StillMissing
from .options import (
    PROMPTS_FILE,
    SAMPLING,
    Backend,
    Device,
    Dtype,
    Guidance,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    load,
)
from .presets import Preset, filled
from .terminal import console, messages, saying


def profile(
    out: Annotated[Path, typer.Option(help="Folder for profile.safetensors and plots.")],
    model: Model = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts-file", "--prompts", help=PROMPTS_FILE)] = None,
    limit: Annotated[int, typer.Option(min=1, help="Only the first so many prompts.")] = 16,
    radius: Annotated[int, typer.Option(min=0, help="Of the neighbourhood that the sparsity score leaves out, "
                                                    "tokens.")] = 1,
    tau: Annotated[float | None, typer.Option(min=0, max=1,
                                              help="Line in the plots. Default: the median score.")] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw plots (needs matplotlib).")] = True,
    seed: Seed = 0,
    preset: Preset = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line on stdout.")] = False,
) -> None:
    """Measure what every head looks at and what evicting costs it, for the policies that need to know.

    Without --prompts-file, prompts of the shapes world that the suite of `evaluate` does not use. A run that was
    stopped goes on when called again. With RANK and WORLD_SIZE in the environment, as torchrun sets them, or in a step
    of Slurm, each process measures its share, and the last one to finish writes the profile.
    """
    ranks, began = Ranks.here(), time.perf_counter()
    given = filled(preset, {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p})
    guidance = given["guidance"]
    from ssd_kernels.files import check_folder

    from ..prompts import calibration, fitting, gather, read

    chosen = read(prompts_file)[:limit] if prompts_file else gather(calibration(limit), None)
    check_folder(out)
    if plots:
        from ..extras import needs

        with needs("plot", "matplotlib"):
            import matplotlib  # noqa: F401  # before the long part, not after
    pipe = load(model, device, dtype, backend, ranks, sampling={name: given[name] for name in SAMPLING})
    texts = [prompt.text for prompt in fitting(pipe, chosen)]
    from .. import plots as plotting
    from ..profiling import measure
    from ..progress import progress_bar

    try:
        with progress_bar("profiling", ranks) as show:
            measured = measure(pipe, texts, guidance_scale=guidance, seed=seed, radius=radius, batch_size=batch_size,
                               progress=show, folder=out / "parts", ranks=ranks)
    except StillMissing as missing:
        saying(ranks)(str(missing))
        return
    files = [out / "profile.safetensors"]
    measured.save(files[0])
    if plots:
        files += plotting.save_all(measured, out, tau)
    seconds = round(time.perf_counter() - began, 1)
    facts = {"files": [str(file) for file in files], "prompts": len(texts), "seconds": seconds}
    if as_json:
        print(json.dumps(facts))
        return
    for file in files:
        console.print(str(file), soft_wrap=True)
    messages.print(f"{len(texts)} prompts in {seconds} s")
