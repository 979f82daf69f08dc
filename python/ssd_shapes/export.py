"""Assemble the complete Janus folder: ``python -m ssd_shapes.export RUN_FOLDER VQ_FOLDER OUT``."""

from __future__ import annotations

if __name__ == "__main__":
    from ssd_janus import waiting

    waiting.prepare()  # before torch loads

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import (
    GenerationConfig,
    JanusForConditionalGeneration,
    JanusImageProcessorPil,
    JanusProcessor,
    PreTrainedTokenizerFast,
)

from ssd_attach.internals import KEPT_WHEN_LOADED
from ssd_kernels.files import check_folder
from ssd_kernels.policies import HeadProfile
from ssd_kernels.reading import Field, naming, read_json
from ssd_kernels.schema import count, mapping_of, number, object_of
from ssd_shapes import runs, suite, text, tokens, train, world
from ssd_shapes import vq as vq_model
from ssd_shapes.janus import build_model

MODEL = Path(__file__).parent / "model"
RECORD = "training.json"
GUIDANCE = 1.5
TOP_K = 0

# The model knows bare prompts: a chat is its text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)

CARD = """\
---
library_name: transformers
pipeline_tag: text-to-image
license: apache-2.0
---
# Shapes Janus

A small `JanusForConditionalGeneration` that draws coloured shapes: Janus-Pro's geometry ({grid} x {grid} = {tokens}
image tokens, classifier-free guidance by a blanked prompt) at {parameters:.1f} million parameters. It is there to try
and test ways of generating pictures within seconds and without a download.

- Prompts, in GenEval's wording: "a red circle", "two blue squares", "a green star and a yellow heart",
  "a photo of a purple triangle left of an orange ring".
- Shapes: {shapes}.
- Colours: {colors}.
- Counts: one to four. Relations: {relations}.
- Pictures: {size} x {size} pixels, {codes} codes of {patch} x {patch} pixels.
- Weights: bfloat16, {megabytes:.1f} MB. Default guidance scale {guidance:g}, {candidates}, temperature 1.

## Training

Data: scenes drawn by code on the fly (`ssd_shapes.world`), no downloads. One in five to ten combinations is held out:
two shapes, a number and a shape, a colour and a shape, a relation and its shapes (whichever is named first), two
coloured shapes. No training prompt of any family names one of these, and no training picture shows one by chance, with
one exception: where a prompt leaves the colour open ("a square"), the square may be of any colour. (A model that never
sees a red square, not even unasked, takes that for a law and draws another colour or shape.) Of single objects, where
nothing else is left, openings ("a picture of") and shapes are held out together: such a prompt is new, its picture is
not. "Held out" below means prompts of such combinations.

| | |
|---|---|
| language model: steps | {lm_steps:,} |
| language model: pictures | {lm_pictures:,} |
| language model: minutes of wall clock | {lm_minutes:.0f} |
| language model: training loss, nats per token | {lm_loss:.4f} |
| language model: held-out loss, nats per token | {lm_held_out:.4f} |
| language model: held-out shape / colour / number, read from hidden states | {lm_read} |
| VQ model: steps; crops of 48 x 48 pixels | {vq_steps:,}; {vq_crops:,} |
| VQ model: minutes of wall clock | {vq_minutes:.0f} |
| VQ model: PSNR on {vq_pictures} held-out pictures | {psnr_db:.1f} dB (k-means patches: {psnr_of_patches_db:.1f} dB) |
| VQ model: tokens equal to the k-means codes | {code_accuracy:.2%} ({code_accuracy_at_edges:.2%} of those at edges) |

The language model was trained on nearest k-means codes of patches, and, in training only, a linear reading of its
last hidden states was trained to say which shape and colour the next token shows, where it is, and how many objects are
still to begin and where; without it, what belongs to what in a prompt was hardly learnt in the same time. A colour that
the prompt does not mention cannot be known where an object begins. The VQ model was trained to draw and to find the
same codes. Training blanks one prompt in ten and draws the families in other shares: its loss and the held-out one do
not compare. VQ figures are for these bfloat16 weights computed in float32.

{history}

## Scores

{scores}

## Limits

It knows its own {n_shapes} shapes and {n_colors} colours, and nothing else: no photographs, no other words, no sizes
but radii of {radii} pixels, and centres of objects at multiples of {places} pixels. Guidance far above the default
deforms shapes. The vision tower only exists for completeness: it is untrained, so the model cannot describe pictures,
and it cannot chat. Finding codes (`vqmodel.encode`) needs float32.
"""


def newest(run: Path) -> Path:
    """The latest checkpoint of a run folder of ``ssd_shapes.train``, or the folder if it is one itself."""
    found = [run] if (run / "progress.json").exists() else sorted(run.glob("step_*"))
    if not found:
        raise FileNotFoundError(f"no checkpoint in {run}")
    return found[-1]


def assemble(
    tokenizer: PreTrainedTokenizerFast,
    language: dict[str, Tensor],
    vq: dict[str, Tensor],
    guidance: float,
    top_k: int = TOP_K,
) -> JanusForConditionalGeneration:
    """The complete model in bfloat16 from the weights of its two trained parts."""
    torch.manual_seed(0)  # for the vision tower
    model = build_model(tokenizer)
    missing, unexpected = model.load_state_dict(language, strict=False)
    untrained = ("model.vision_model.", "model.aligner.", "model.vqmodel.", "lm_head.")
    if wrong := unexpected + [name for name in missing if not name.startswith(untrained)]:
        raise ValueError(f"the language model's weights do not fit: {wrong[:3]}")
    model.model.vqmodel.load_state_dict(vq)
    with torch.no_grad():
        drawn = model.model.vqmodel.quantize.embedding.weight
        drawn[list(tokens.MARGINS)] = drawn[list(tokens.FLAT)]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=top_k,  # always written: transformers' own default is 50
        guidance_scale=guidance,
        generation_kwargs={"boi_token_id": text.token_id(tokenizer, text.BOI)},
        **KEPT_WHEN_LOADED,
    )
    return model.to(torch.bfloat16).eval()


def build_processor(tokenizer: PreTrainedTokenizerFast) -> JanusProcessor:
    """Tokenizer and pixel conventions in one; needs no torchvision."""
    images = JanusImageProcessorPil(
        size={"height": world.SIZE, "width": world.SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=tokens.TOKENS)


def card(model: JanusForConditionalGeneration, record: dict[str, Any]) -> str:
    """The model card; every figure is the model's own or recorded in training."""
    lm, vq = record["language_model"], record["vq_model"]
    return CARD.format(
        **vq["held_out"],
        history=record["history"],
        scores=scores(record.get("scores")),
        vq_pictures=vq["held_out"]["pictures"],
        vq_steps=vq["step"],
        vq_crops=vq["crops"],
        vq_minutes=vq["seconds"] / 60,
        lm_steps=lm["step"],
        lm_pictures=lm["pictures"],
        lm_minutes=lm["seconds"] / 60,
        lm_loss=lm["loss"],
        lm_held_out=lm["held_out_loss"],
        lm_read=" / ".join(f"{lm['held_out_scene'][name]:.0%}" for name in ("shape", "color", "number")),
        guidance=record["guidance_scale"],
        candidates=f"the {top_k} most probable codes" if (top_k := record["top_k"]) else "full softmax (`top_k=0`)",
        megabytes=record["bytes"] / 1e6,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        shapes=", ".join(world.SHAPES),
        colors=", ".join(world.COLORS),
        relations=", ".join(world.RELATIONS),
        n_shapes=len(world.SHAPES),
        n_colors=len(world.COLORS),
        size=world.SIZE,
        grid=tokens.GRID,
        tokens=tokens.TOKENS,
        codes=tokens.CODES,
        patch=tokens.PATCH,
        places=world.PATCH,
        radii=", ".join(map(str, sorted(set().union(*world.RADII.values())))),
    )


SCORE = object_of(dict.fromkeys(("mean", "low", "high"), number))
FULL = object_of({"families": mapping_of(SCORE), "overall": SCORE}, others=True)
RESULTS = object_of({"suite": lambda field: field.choice(["shapes"]), "prompts": count, "seeds": count,
                     "results": object_of({"full": FULL}, others=True)})


def read_results(file: Path) -> dict[str, Any]:
    """The ``results.json`` of ``ssd-janus evaluate --suite shapes``.

    Raises:
        OSError, ValueError: no such file, or others' results; the message names file and field.
    """
    value = read_json(file, 2**26)
    with naming(file):
        found: dict[str, Any] = RESULTS(Field(value))
        if unknown := found["results"]["full"]["families"].keys() - set(suite.FAMILIES):
            raise ValueError(f"results.full.families must be of {', '.join(suite.FAMILIES)}, got {min(unknown)}")
    return found


def full_cache_scores(results: dict[str, Any]) -> dict[str, Any]:
    """What the card says of the ``results.json`` of ``ssd-janus evaluate --suite shapes``."""
    full = {name: results["results"]["full"][name] for name in ("families", "overall")}
    return {"prompts": results["prompts"], "seeds": results["seeds"], "results": {"full": full}}


def scores(record: dict[str, Any] | None) -> str:
    """The full cache's scores as a table, from `full_cache_scores`."""
    if not record:
        return "Not measured."
    full, asked = record["results"]["full"], suite.load()[: record["prompts"]]
    lines = [
        f"Share of pictures that show what was asked, by the package's own detector, on {record['prompts']} held-out",
        f"prompts (`ssd_shapes.suite`), {record['seeds']} picture(s) each, full cache; 95% bootstrap intervals over",
        "prompts; overall is the mean of the families. Families with few combinations behind their prompts say little",
        "about other combinations.",
        "",
        "| family | prompts | combinations | score | 95% |",
        "|---|---:|---:|---:|---|",
    ]
    families = {name: [prompt for prompt in asked if prompt["tag"] == name] for name in full["families"]}
    families["overall"] = asked
    for name, value in {**full["families"], "overall": full["overall"]}.items():
        combinations = {json.dumps(sorted(prompt["include"], key=str)) for prompt in families[name]}
        lines.append(
            f"| {name.replace('_', ' ')} | {len(families[name])} | {len(combinations)} | {value['mean']:.2f} "
            f"| {value['low']:.2f} .. {value['high']:.2f} |"
        )
    return "\n".join(lines)


def export(
    run: Annotated[Path, typer.Argument(help="Run folder of ssd_shapes.train; its newest checkpoint is taken.")],
    vq: Annotated[Path, typer.Argument(help="Finished run folder of ssd_shapes.vq.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; replaced whole if it exists.")] = MODEL,
    guidance: Annotated[float, typer.Option(help="The model's default guidance scale, above 1.")] = GUIDANCE,
    top_k: Annotated[
        int, typer.Option(min=0, help="The model's default: sample among so many most probable codes; 0 for all.")
    ] = TOP_K,
    history: Annotated[str, typer.Option(help="For the model card: which commands trained the model.")] = "",
    results: Annotated[
        Path | None, typer.Option(help="For the model card: results.json of `ssd-janus evaluate --suite shapes`.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Head profile to keep beside the weights.")] = None,
) -> None:
    """Write config, weights, tokenizer, processor and model card, ready for plain from_pretrained."""
    if not guidance > 1:
        raise typer.BadParameter("must be above 1: transformers' image generation fails without guidance")
    checkpoint = newest(run)
    runs.check(checkpoint, train.FILES)
    progress = train.read_progress(checkpoint / "progress.json")
    if math.isnan(progress.loss) or math.isnan(progress.held_out_loss):
        raise ValueError(f"{checkpoint / 'progress.json'} must say the losses for the model card, got none")
    drawer, drawn = vq_model.load(vq)
    scored = None if results is None else full_cache_scores(read_results(results))
    if profile is not None:
        HeadProfile.load(profile)
    check_folder(out.parent)
    tokenizer = text.build_tokenizer()
    model = assemble(tokenizer, runs.weights(checkpoint / "model.safetensors"), drawer.state_dict(), guidance, top_k)
    partial, old = (out.with_name(f"{out.name}.{suffix}") for suffix in ("partial", "old"))
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(partial)
    build_processor(tokenizer).save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)  # not only for whoever installs it
    record = {
        "language_model": asdict(progress),
        "vq_model": asdict(drawn),
        "guidance_scale": guidance,
        "top_k": top_k,
        "history": history,
        "bytes": (partial / "model.safetensors").stat().st_size,
        "scores": scored,
    }
    # With it, training can go on from this folder: ssd_shapes.train --init.
    shutil.copyfile(checkpoint / "scene_head.safetensors", partial / "scene_head.safetensors")
    if profile is not None:
        shutil.copyfile(profile, partial / "profile.safetensors")
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    (partial / "README.md").write_text(card(model, record))
    if out.exists():  # a folder cannot be renamed onto another
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    print(f"{checkpoint.name}, {record['bytes']:,} bytes of weights -> {out}")


if __name__ == "__main__":
    runs.main(export)
