"""Train the language model of the shapes world: ``python -m ssd_shapes.train --help``."""

from __future__ import annotations

if __name__ == "__main__":
    from ssd_janus import waiting

    waiting.prepare()  # before torch loads

import io
import math
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration

import ssd_kernels
from ssd_kernels.reading import Field, naming, read_bytes, read_json
from ssd_kernels.schema import count, mapping_of, maybe, number, object_of
from ssd_shapes import attention, losses, runs, text, tokens
from ssd_shapes.data import Batch, Batches
from ssd_shapes.janus import CODE_WIDTH, build_model

TRAINED = ("language_model", "generation_embeddings", "generation_aligner", "generation_head")
DECAY_SHARE = 0.5  # of all steps, at the end
HELD_OUT_BATCHES = 8
FILES = ("model.safetensors", "scene_head.safetensors", "optimizer.pt", "progress.json")  # of a checkpoint
PROGRESS = object_of({"step": count, "pictures": count, "seconds": number, "loss": maybe(number),
                      "held_out_loss": maybe(number), "held_out_scene": mapping_of(number)})


@dataclass
class Progress:
    """What a resumed run needs besides weights and optimiser state."""

    step: int = 0
    pictures: int = 0
    seconds: float = 0.0
    loss: float = float("nan")  # nats per image token, running mean
    held_out_loss: float = float("nan")
    held_out_scene: dict[str, float] = field(default_factory=dict)  # shares read right: see losses.scene_accuracy


def schedule(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay to zero over the last half."""
    return max(0.0, min((step + 1) / warmup, 1.0, (steps - step) / (DECAY_SHARE * steps)))


def initialise(model: JanusForConditionalGeneration, book: tokens.CodeBook) -> None:
    """Start code embeddings at the patches' principal components, and keep their scale on the way in."""
    janus = model.model
    centred = book.codes - book.codes.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    components = centred @ axes[:CODE_WIDTH].T
    with torch.no_grad():
        janus.generation_embeddings.weight.copy_(components / components.std(0))
        for layer in janus.generation_aligner.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=layer.in_features**-0.5)


def trained_state(model: JanusForConditionalGeneration) -> dict[str, Tensor]:
    """The weights this script trains, by their names in the complete model."""
    names = tuple(f"model.{part}." for part in TRAINED)
    return {name: value for name, value in model.state_dict().items() if name.startswith(names)}


def average(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of weights of the same names and shapes, in float32 (Wortsman et al., "Model soups", 2022).

    Raises:
        ValueError: names or shapes differ.
    """
    for state in states[1:]:
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in states[0].items()}:
            raise ValueError("weights to average must have the same names and shapes")
    return {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}


def orthogonalize(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton-Schulz iteration of torch's Muon, [m, n] to [m, n], in float32 instead of bfloat16.

    On a CPU without bfloat16 arithmetic torch's own takes longer than the rest of a step.
    """
    a, b, c = coefficients
    x = grad.T if len(grad) > len(grad.T) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if len(grad) > len(grad.T) else x


def optimizers(
    model: JanusForConditionalGeneration, head: losses.SceneHead, lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices; AdamW for embeddings, the two ends of the code path, norms and biases."""
    matrices, others = [], list(head.parameters())
    for name, parameter in model.model.named_parameters():
        if not name.startswith(TRAINED):
            parameter.requires_grad_(False)
        elif parameter.ndim == 2 and not any(end in name for end in ("embed", "fc1", "vision_head")):
            matrices.append(parameter)
        else:
            others.append(parameter)
    if not losses.HAS_BFLOAT16:
        torch.optim._muon._zeropower_via_newtonschulz = orthogonalize
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def save(
    run: Path, model: JanusForConditionalGeneration, head: losses.SceneHead, opts: list[Any], progress: Progress
) -> None:
    """Write ``run/step_NNNNNNN`` in one rename, with digests of its files, and drop all but the newest two."""
    target = run / f"step_{progress.step:07d}"
    partial = run / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in trained_state(model).items()}, partial / "model.safetensors")
    save_file(head.state_dict(), partial / "scene_head.safetensors")
    torch.save([opt.state_dict() for opt in opts], partial / "optimizer.pt")
    runs.write_json(partial / "progress.json", runs.finite(asdict(progress)))
    runs.seal(partial, FILES)
    shutil.rmtree(target, ignore_errors=True)  # one that `resume` found damaged
    partial.rename(target)
    for old in sorted(run.glob("step_*"))[:-2]:
        shutil.rmtree(old)


def resume(run: Path, model: JanusForConditionalGeneration, head: losses.SceneHead, opts: list[Any]) -> Progress:
    """Load the newest checkpoint of a run folder, if any; peak learning rates stay those asked for now.

    A damaged one is named on stderr and left out.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    found = sorted(run.glob("step_*"), reverse=True)
    for checkpoint in found:
        try:
            return _load(checkpoint, model, head, opts)
        except ValueError as error:
            print(f"{error}; leaving {checkpoint.name} out", file=sys.stderr, flush=True)
    if found:
        raise ValueError(f"no checkpoint in {run} can be read; remove the folder to start anew")
    return Progress()


def _load(checkpoint: Path, model: JanusForConditionalGeneration, head: losses.SceneHead, opts: list[Any]) -> Progress:
    runs.check(checkpoint, FILES)
    progress = read_progress(checkpoint / "progress.json")
    weights, scene = (runs.weights(checkpoint / name) for name in FILES[:2])
    runs.check_shapes(checkpoint / FILES[0], weights, trained_state(model))
    runs.check_shapes(checkpoint / FILES[1], scene, head.state_dict())
    states = torch.load(io.BytesIO(read_bytes(checkpoint / "optimizer.pt", runs.LARGEST)), weights_only=True)
    for opt, state in zip(opts, states, strict=True):
        peaks = [group["peak"] for group in opt.param_groups]
        opt.load_state_dict(state)
        for group, peak in zip(opt.param_groups, peaks, strict=True):
            group["peak"] = peak
    model.load_state_dict(weights, strict=False)
    head.load_state_dict(scene)
    return progress


def read_progress(file: Path) -> Progress:
    """What a checkpoint says of its run.

    Raises:
        OSError, ValueError: no such file, or a damaged one; the message names file and field.
    """
    value = read_json(file, 2**20)
    with naming(file):
        found = PROGRESS(Field(value))
    return Progress(**{name: math.nan if value is None else value for name, value in found.items()})


def measure(
    model: JanusForConditionalGeneration, head: losses.SceneHead, batches: list[Batch], progress: Progress
) -> None:
    """Write the loss of image tokens and the shares of scenes read right on ``batches`` into ``progress``."""
    found, read = 0.0, dict[str, float]()
    for batch in batches:
        hidden, logits = losses.predict(model, batch)
        found += losses.token_loss(logits, batch).item() / len(batches)
        for name, share in losses.scene_accuracy(head(hidden), batch).items():
            read[name] = read.get(name, 0.0) + share / len(batches)
    progress.held_out_loss, progress.held_out_scene = found, read


def train(
    run: Annotated[Path, typer.Option(help="Folder of the checkpoints; an existing run is resumed.")],
    steps: Annotated[
        int, typer.Option(help="All steps, past ones included. The last half decays.")
    ] = 2100,
    init: Annotated[
        list[Path] | None, typer.Option(help="Start a new run from the weights of an exported folder; of several, from "
                                             "their mean.")
    ] = None,
    until: Annotated[
        int | None, typer.Option(help="Stop at this step, with the schedule of --steps; to resume with other options, "
                                      "see --change-options.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the hidden matrices (Muon).")] = 3e-3,
    adam_lr: Annotated[float, typer.Option(help="Peak learning rate of everything else (AdamW).")] = 2e-3,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 100,
    identity_weight: Annotated[
        float, typer.Option(help="How much more the tokens that begin an object count.")
    ] = 10.0,
    late: Annotated[float, typer.Option(help="Share of the steps after which families are drawn by "
                                             "world.LATE_FAMILIES.")] = 0.5,
    whole: Annotated[float, typer.Option(help="Share of the steps after which no background is left out.")] = 0.88,
    open_colors_from: Annotated[
        int, typer.Option(help="Step from which colours that prompts leave open may make a held-out pair with a shape.")
    ] = 1858,
    scene_weight: Annotated[float, typer.Option(help="Weight of reading the scene from hidden states.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 300.0,
    log_every: Annotated[int, typer.Option(help="Steps between progress lines.")] = 20,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the decoder layers.")
    ] = True,
    change_options: Annotated[
        bool, typer.Option("--change-options", help="Resume with other options than the run was started with.")
    ] = False,
) -> None:
    """Train on pictures drawn on the fly. SIGTERM and Ctrl-C write a checkpoint; the same command resumes.

    The code book is read from the package's assets and fitted first if there is none.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if not tokens.ASSET.exists():
        tokens.fit(seed).save()
    book, tokenizer = tokens.CodeBook.load(), text.build_tokenizer()
    model = build_model(tokenizer)
    model.set_attn_implementation({"text_config": attention.register()})
    initialise(model, book)
    head = losses.SceneHead()
    opts = optimizers(model, head, lr, adam_lr)
    if init:
        weights, scene = (average([runs.weights(folder / name) for folder in init]) for name in FILES[:2])
        runs.check_shapes(init[0] / FILES[0], weights, trained_state(model))
        runs.check_shapes(init[0] / FILES[1], scene, head.state_dict())
        model.load_state_dict({name: weights[name] for name in trained_state(model)}, strict=False)
        head.load_state_dict(scene)
    progress = resume(run, model, head, opts)
    run.mkdir(parents=True, exist_ok=True)
    options = {"version": ssd_kernels.__version__, "steps": steps, "batch": batch, "lr": lr, "adam_lr": adam_lr,
               "warmup": warmup, "identity_weight": identity_weight, "late": late, "whole": whole,
               "open_colors_from": open_colors_from, "scene_weight": scene_weight, "seed": seed,
               "init": [runs.digest(folder / FILES[0]) for folder in init or ()]}
    runs.keep_options(run, options, progress.step > 0, change_options)
    if compiled:
        for layer in model.model.language_model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    late_from, whole_from = round(late * steps), round(whole * steps)
    batches = Batches(tokenizer, book, batch, seed=seed, late_from=late_from, whole_from=whole_from,
                      open_colors_from=open_colors_from)  # fmt: skip
    tests = Batches(tokenizer, book, 8, 0.0, seed, "test")
    held_out = [tests(i) for i in range(HELD_OUT_BATCHES)]
    parameters = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    print(f"{size:,} trained parameters, from step {progress.step} to {steps}", flush=True)

    stopped: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda received, frame: stopped.append(received))
    model.train()
    recent: list[float] = []
    saved = began = time.monotonic()
    end = steps if until is None else min(until, steps)
    while progress.step < end and not stopped:
        factor = schedule(progress.step, steps, warmup)
        data = batches(progress.step)
        hidden, logits = losses.predict(model, data)
        loss = losses.token_loss(logits, data)
        extra = identity_weight * losses.identity_loss(logits, data)
        extra = extra + scene_weight * losses.scene_loss(head(hidden), data)
        torch.autograd.backward(loss + extra)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * factor
            opt.step()
            opt.zero_grad()
        recent.append(loss.item())
        progress.step += 1
        progress.pictures += batch
        last = progress.step == end or bool(stopped)
        if progress.step % log_every == 0 or last:
            now = time.monotonic()
            progress.loss, progress.seconds = sum(recent) / len(recent), progress.seconds + now - began
            print(
                f"step {progress.step} loss {progress.loss:.4f} norm {norm:.2f} lr {lr * factor:.2e} "
                f"{len(recent) / (now - began):.2f} steps/s {progress.pictures:,} pictures "
                f"{progress.seconds / 60:.1f} min",
                flush=True,
            )
            recent, began = [], now
        if time.monotonic() - saved > save_every or last:
            with torch.no_grad():
                measure(model, head, held_out, progress)
            save(run, model, head, opts, progress)
            shares = " ".join(f"{name} {share:.0%}" for name, share in progress.held_out_scene.items())
            print(f"step {progress.step} saved; held out: loss {progress.held_out_loss:.4f} {shares}", flush=True)
            saved = time.monotonic()


if __name__ == "__main__":
    runs.main(train)
