"""Train the VQ model that turns the code book's tokens into pictures and back: ``python -m ssd_shapes.vq --help``.

The language model learns k-means codes of 4 x 4 patches (``tokens``). Here transformers' ``JanusVQVAE`` learns the
same codes: its decoder draws pictures from them, its encoder finds them. Both are convolutional, so crops around
the edges of objects, where there is something to learn, teach as much as whole pictures.
"""

from __future__ import annotations

if __name__ == "__main__":
    from ssd_janus import waiting

    waiting.prepare()  # before torch loads

import io
import json
import math
import pickle
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save
from torch import Tensor, nn
from transformers import JanusVQVAE

import ssd_kernels
from ssd_attach.internals import modeling_janus
from ssd_kernels.files import write_atomically
from ssd_kernels.reading import Field, naming, read_bytes, read_json
from ssd_kernels.schema import count, mapping_of, number, object_of
from ssd_shapes import runs, text, tokens, train, world
from ssd_shapes.janus import CODE_WIDTH, build_config
from ssd_shapes.losses import HAS_BFLOAT16

CROP = 12  # patches per side
SOFT = 16.0  # eps of the norms while training
SHARPNESS = 50.0  # of the softmax over code similarities
PIXEL_WEIGHT = 100.0  # of the squared error (pixels in -1..1) beside the cross-entropy
HELD_OUT = 100  # pictures


FILES = ("model.safetensors", "progress.json")  # of a finished run
PROGRESS = object_of({"step": count, "crops": count, "seconds": number, "held_out": mapping_of(Field.number)})


@dataclass
class Progress:
    """What a run has done; ``held_out`` is measured on the finished model."""

    step: int = 0
    crops: int = 0
    seconds: float = 0.0
    held_out: dict[str, float] = field(default_factory=dict)


def to_model(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to the model's float32 [B, 3, H, W] in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(values: Tensor) -> Tensor:
    """The reverse of ``to_model``."""
    return ((values.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def draw(seed: int, step: int, size: int, split: world.Split = "train") -> Tensor:
    """Pictures of random scenes, uint8 [B, 96, 96, 3], as a function of the arguments."""
    rng = np.random.default_rng([seed, step, split == "test"])
    scenes = [world.draw_scene(rng, world.draw_prompt(rng, split), open_colors=False) for _ in range(size)]
    return torch.from_numpy(np.stack([world.render(scene) for scene in scenes]))


def flat(pictures: Tensor) -> Tensor:
    """Which patches have one colour: bool [B, 576]."""
    cut = tokens.patches(pictures).unflatten(-1, (-1, 3))
    return (cut == cut[:, :, :1]).flatten(2).all(-1)


def crops(pictures: Tensor, book: tokens.CodeBook, seed: int) -> tuple[Tensor, Tensor]:
    """One crop per picture, with the edge of an object in it: uint8 [B, 48, 48, 3] and codes [B, 12, 12]."""
    rng = np.random.default_rng(seed)
    codes = book.encode(pictures).view(-1, tokens.GRID, tokens.GRID)
    edges = ~flat(pictures).view_as(codes)
    parts, labels = [], []
    for picture, code, edge in zip(pictures, codes, edges, strict=True):
        places = edge.nonzero()
        row, column = (places[int(rng.integers(len(places)))].numpy() - rng.integers(0, CROP, 2)).clip(
            0, tokens.GRID - CROP
        )
        size, step = CROP * tokens.PATCH, tokens.PATCH
        parts.append(picture[row * step :, column * step :][:size, :size])
        labels.append(code[row:, column:][:CROP, :CROP])
    return torch.stack(parts), torch.stack(labels)


def principal(book: tokens.CodeBook) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [48], principal axes [48, 48] (one per row) and deviations [48] of the codes, pixels in -1..1."""
    codes = book.codes / 127.5 - 1
    _, values, axes = torch.linalg.svd(codes - codes.mean(0), full_matrices=False)
    return codes.mean(0), axes, values / len(codes) ** 0.5


def initialise(vq: JanusVQVAE, book: tokens.CodeBook) -> None:
    """Start the encoder as principal component analysis of each patch and the code book as its directions.

    A norm group takes the mean of its two channels away, so a component travels as a pair (x, -x); and
    swish(x) - swish(-x) = x carries it through the last activation. Attention starts and stays at nothing: a patch
    is decoded from its neighbourhood alone.
    """
    mean, axes, deviation = principal(book)
    encoder, pairs = vq.encoder, torch.arange(vq.config.base_channels // 2)
    axes, deviation = axes[: len(pairs)], deviation[: len(pairs)]
    # Half-whitened leading components and a constant: on the sphere, codes that look alike are neighbours.
    lift = 0.8 * deviation[: CODE_WIDTH - 1].rsqrt() / deviation[: CODE_WIDTH - 1].sum().sqrt()
    with torch.no_grad():
        for layer in (vq.post_quant_conv, *vq.decoder.modules()):
            if isinstance(layer, nn.Conv2d):  # keeps the scale of its input
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        for module in vq.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.fill_(SOFT**0.5)
            elif isinstance(module, modeling_janus.JanusVQVAEResnetBlock):
                module.conv2.weight.mul_(0.1)
            elif isinstance(module, modeling_janus.JanusVQVAEAttnBlock):
                module.requires_grad_(False)
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)
        down = [level.downsample.conv for level in encoder.down[:-1]]
        for layer in (encoder.conv_in, *down, encoder.conv_out, vq.quant_conv):
            layer.weight.mul_(0.05)
            nn.init.zeros_(layer.bias)
        colors = torch.arange(3)
        encoder.conv_in.weight[colors, colors, 1, 1] += 1
        for y in range(2):
            for x in range(2):
                down[0].weight[(2 * y + x) * 3 + colors, colors, y, x] += 1
                # Pixel (2y + v, 2x + u) of a patch is channel (2v + u) * 3 + colour of the half-size picture.
                part = axes.view(-1, 4, 4, 3)[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten(1)
                part = part / deviation[:, None]
                down[1].weight[2 * pairs, :12, y, x] += part
                down[1].weight[2 * pairs + 1, :12, y, x] -= part
        offset = axes @ mean / deviation
        down[1].bias[2 * pairs], down[1].bias[2 * pairs + 1] = -offset, offset
        encoder.conv_out.weight[pairs, 2 * pairs, 1, 1] += 1
        encoder.conv_out.weight[pairs, 2 * pairs + 1, 1, 1] -= 1
        leading = torch.arange(CODE_WIDTH - 1)
        vq.quant_conv.weight[leading, leading, 0, 0] += lift * deviation[leading]
        vq.quant_conv.bias[-1] = 1
        places = (book.codes / 127.5 - 1 - mean) @ axes[leading].T * lift
        vq.quantize.embedding.weight.copy_(F.normalize(F.pad(places, (0, 1), value=1.0)))


def soften(vq: JanusVQVAE) -> None:
    """Large eps in all norms: they hardly depend on the picture, so flat areas keep their colour."""
    for module in vq.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = SOFT


def harden(vq: JanusVQVAE) -> None:
    """Give the norms transformers' eps again, without changing what the model computes.

    norm(x; eps) = norm(x * s; eps * s^2), so everything that feeds a norm is scaled: the convolutions inside
    residual blocks, and the residual stream itself, by what is added to it.
    """
    resnet, attention = modeling_janus.JanusVQVAEResnetBlock, modeling_janus.JanusVQVAEAttnBlock
    down, up = modeling_janus.JanusVQVAEConvDownsample, modeling_janus.JanusVQVAEConvUpsample
    scale = (1e-6 / SOFT) ** 0.5
    with torch.no_grad():
        for module in vq.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = 1e-6
            elif isinstance(module, resnet):
                for layer in (module.conv1, module.conv2):
                    layer.weight.mul_(scale)
                    layer.bias.mul_(scale)
            elif isinstance(module, attention):
                module.proj_out.weight.mul_(scale)
                module.proj_out.bias.mul_(scale)
            elif isinstance(module, down | up):
                module.conv.bias.mul_(scale)  # the stream it works on is scaled already
        for part in (vq.encoder, vq.decoder):
            part.conv_in.weight.mul_(scale)
            part.conv_in.bias.mul_(scale)
        vq.quantize.embedding.weight.copy_(F.normalize(vq.quantize.embedding.weight))


def losses(vq: JanusVQVAE, pictures: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of drawing ``pictures`` from ``codes``, and cross-entropy (nats) of finding the codes."""
    wanted = to_model(pictures)
    embedding = F.normalize(vq.quantize.embedding.weight)
    found = vq.quant_conv(vq.encoder(wanted)).permute(0, 2, 3, 1)
    entropy = F.cross_entropy(SHARPNESS * (found @ embedding.T).flatten(0, 2), codes.flatten())
    with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16):
        drawn = vq.decoder(vq.post_quant_conv(embedding[codes].permute(0, 3, 1, 2)))
    return (drawn.float() - wanted).square().mean(), entropy


def psnr(pictures: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures, dB, from the mean squared error over all of them."""
    return 10 * math.log10(255**2 / (pictures.float() - wanted.float()).square().mean().item())


@torch.no_grad()
def evaluate(vq: JanusVQVAE, book: tokens.CodeBook, pictures: Tensor) -> dict[str, float]:
    """How well the model reproduces ``pictures`` [B, 96, 96, 3], and the code book's codes, through its own codes."""
    codes, edges = book.encode(pictures), ~flat(pictures)
    found, drawn = [], []
    for part in pictures.split(10):
        found.append(vq.encode(to_model(part).to(vq.dtype)).image_tokens.view(len(part), -1))
        drawn.append(to_bytes(vq.decode(found[-1])))
    same = torch.cat(found) == codes
    return {
        "pictures": len(pictures),
        "psnr_db": round(psnr(torch.cat(drawn), pictures), 2),
        "psnr_of_patches_db": round(psnr(book.decode(codes), pictures), 2),
        "code_accuracy": round(same.float().mean().item(), 5),
        "code_accuracy_at_edges": round(same[edges].float().mean().item(), 5),
    }


def build() -> JanusVQVAE:
    """The VQ model of the included Janus, freshly drawn."""
    config = build_config(text.build_tokenizer(prompts=100)).vq_config
    return JanusVQVAE(config)


def load(run: Path) -> tuple[JanusVQVAE, Progress]:
    """A finished model and its record from a run folder.

    Raises:
        OSError, ValueError: the run is not finished, or a file is damaged; the message names it.
    """
    runs.check(run, FILES)
    vq, weights = build(), runs.weights(run / FILES[0])
    runs.check_shapes(run / FILES[0], weights, vq.state_dict())
    vq.load_state_dict(weights)
    value = read_json(run / FILES[1], 2**20)
    with naming(run / FILES[1]):
        return vq, Progress(**PROGRESS(Field(value)))


def resume(checkpoint: Path, vq: JanusVQVAE, optimizer: torch.optim.Optimizer) -> Progress:
    """Load a checkpoint, if there is one.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    if not checkpoint.exists():
        return Progress()
    try:
        state = torch.load(io.BytesIO(read_bytes(checkpoint, runs.LARGEST)), weights_only=True)
        progress = Progress(**PROGRESS(Field(state["progress"])))
        vq.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{checkpoint} is damaged ({reason}); remove it to start anew") from None
    return progress


def fit(
    run: Annotated[Path, typer.Option(help="Folder of the checkpoint and the result; an existing run is resumed.")],
    steps: Annotated[int, typer.Option(help="All steps, past ones included. The last half decays.")] = 600,
    batch: Annotated[int, typer.Option(help="Crops per step.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate (AdamW).")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    log_every: Annotated[int, typer.Option(help="Steps between progress lines.")] = 50,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    change_options: Annotated[
        bool, typer.Option("--change-options", help="Resume with other options than the run was started with.")
    ] = False,
) -> None:
    """Train on crops drawn on the fly. SIGTERM and Ctrl-C write a checkpoint; the same command resumes.

    The finished run folder has model.safetensors and progress.json, with PSNR and code accuracy on held-out pictures.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    book, vq = tokens.CodeBook.load(), build()
    initialise(vq, book)
    soften(vq)
    parameters = [p for p in vq.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    checkpoint = run / "checkpoint.pt"
    progress = resume(checkpoint, vq, optimizer)
    run.mkdir(parents=True, exist_ok=True)
    options = {"version": ssd_kernels.__version__, "steps": steps, "batch": batch, "lr": lr, "seed": seed}
    runs.keep_options(run, options, progress.step > 0, change_options)
    print(f"{sum(p.numel() for p in parameters):,} trained parameters, step {progress.step} to {steps}", flush=True)

    stopped: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda received, frame: stopped.append(received))
    recent: list[tuple[float, float]] = []
    saved = began = time.monotonic()
    while progress.step < steps and not stopped:
        for group in optimizer.param_groups:
            group["lr"] = lr * train.schedule(progress.step, steps, 50)
        error, entropy = losses(vq, *crops(draw(seed, progress.step, batch), book, progress.step))
        torch.autograd.backward(PIXEL_WEIGHT * error + entropy)
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append((error.item(), entropy.item()))
        progress.step += 1
        progress.crops += batch
        now = time.monotonic()
        if progress.step % log_every == 0 or progress.step == steps:
            errors, entropies = (sum(column) / len(recent) for column in zip(*recent, strict=True))
            print(
                f"step {progress.step} psnr {10 * math.log10(4 / errors):.2f} dB cross-entropy {entropies:.3f} "
                f"{(progress.seconds + now - began) / 60:.1f} min",
                flush=True,
            )
            recent = []
        if now - saved > save_every or progress.step == steps or stopped:
            progress.seconds, began, saved = progress.seconds + now - began, now, now
            state = {"model": vq.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
            write_atomically(checkpoint, lambda file: torch.save(state, file))  # noqa: B023
    if stopped:
        return
    harden(vq)
    vq.to(torch.bfloat16).float()  # what the exported model will hold
    progress.held_out = evaluate(vq, book, draw(seed, 0, HELD_OUT, "test"))
    print(json.dumps(progress.held_out, indent=1), flush=True)
    weights = {name: value.contiguous() for name, value in vq.state_dict().items()}
    write_atomically(run / FILES[0], lambda file: file.write(save(weights)))
    runs.write_json(run / FILES[1], asdict(progress))
    runs.seal(run, FILES)


if __name__ == "__main__":
    runs.main(fit)
