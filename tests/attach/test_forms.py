"""The forms of Emu3 and of Chameleon as Lumina-mGPT: whole pictures in transformers' own code, constrained to their
rasters, with guidance in their manner."""

from __future__ import annotations

from typing import Any

import decoders
import pytest
import torch
from decoders import BEGIN, CODES, END, END_FRAME, END_IMAGE, IDS, LINE, MASK, NEGATIVE
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ssd_attach import attach, caches, detach
from ssd_attach.internals import CACHE_NAME
from ssd_attach.models import PictureForm, chameleon, emu3
from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.policies import Raster

ROWS, COLUMNS = 4, 5
SIZES = [60, 61]  # tokens that say how large a picture is


@pytest.fixture(scope="module")
def emu() -> PreTrainedModel:
    return decoders.build("emu3")


@pytest.fixture(scope="module")
def lumina() -> PreTrainedModel:
    return decoders.build("chameleon")


class Constraint:
    """What may follow, by how many tokens follow the prompt: a `prefix_allowed_tokens_fn`."""

    def __init__(self, raster: Raster, prompt: int, tail: list[int], head: list[int] | None = None) -> None:
        self.raster, self.prompt, self.tail, self.head = raster, prompt, tail, head or []

    def __call__(self, row: int, ids: torch.Tensor) -> list[int]:
        token = len(ids) - self.prompt
        if token < self.raster.head:
            return [self.head[token]]
        if token >= self.raster.tokens - self.raster.tail:
            return [self.tail[token - self.raster.tokens]]
        return [LINE] if self.raster.place(token) is None else list(CODES)


def write_emu3(model: PreTrainedModel, form: PictureForm, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    allowed = Constraint(form.raster, IDS.shape[1], [END_FRAME, END_IMAGE, END])
    return model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=form.raster.tokens, do_sample=True,
                          top_k=0, guidance_scale=3.0, negative_prompt_ids=NEGATIVE,
                          negative_prompt_attention_mask=torch.ones_like(NEGATIVE), prefix_allowed_tokens_fn=allowed,
                          **options)


def test_emu3_draws_whole_pictures(emu: PreTrainedModel) -> None:
    """Rows with an end-of-line token, three tokens after the last, grouped queries, sampled, left-padded."""
    form = emu3(ROWS, COLUMNS, begin=BEGIN)
    assert form.raster == Raster(ROWS, COLUMNS, line_tokens=1, tail=3) and emu3().raster.tokens == 90 * 91 + 3
    expected = write_emu3(emu, form)
    drawn = expected[:, IDS.shape[1]:]
    assert drawn.shape[1] == form.raster.tokens and drawn[0, -3:].tolist() == [END_FRAME, END_IMAGE, END]
    assert drawn[:, :-3].unflatten(1, (ROWS, COLUMNS + 1))[..., -1].unique().tolist() == [LINE]
    attach(emu, "full", pictures=form)
    assert torch.equal(write_emu3(emu, form), expected)
    choice = attach(emu, "rows", budget=0.75, pictures=form)
    assert choice.plan.row_buffer == COLUMNS + 1
    output = write_emu3(emu, form, return_dict_in_generate=True)
    assert not torch.equal(output.sequences, expected)
    (held,) = [cache for cache in caches(emu) if cache.batch_size == len(IDS) and cache.max_prompt == 6]
    assert held.nbytes == choice.nbytes(len(IDS), 6) < choice.full_nbytes(len(IDS), 6)
    # The first row, its end of line included, stays.
    first = int(MASK[0].sum())
    assert set(range(first + COLUMNS + 1)) <= set(held.positions(1, 0)[0].tolist())
    detach(emu)
    assert torch.equal(write_emu3(emu, form), expected)


def test_emu3_writes_text_meanwhile(emu: PreTrainedModel) -> None:
    words = {"input_ids": IDS[1:2, :-1], "max_new_tokens": 20, "do_sample": False}
    expected = emu.generate(**words)
    attach(emu, CachePlan.uniform(HeadSpec.window(1), decoders.LAYERS, 2), pictures=emu3(ROWS, COLUMNS, begin=BEGIN))
    assert torch.equal(emu.generate(**words), expected)
    detach(emu)


class Guidance(LogitsProcessor):
    """Guided inside the picture only, in Lumina-mGPT's manner: a second forward that begins with begin of image and the
    sizes, drawn or given, with a cache of its own."""

    def __init__(self, model: PreTrainedModel, scale: float) -> None:
        self.model, self.scale, self.cache = model, scale, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        (start,) = (input_ids[0] == BEGIN).nonzero()[-1:].flatten().tolist() or [None]
        if start is None or input_ids.shape[1] < start + 3:
            return scores
        ids = input_ids[:, start:] if self.cache is None else input_ids[:, -1:]
        mask = torch.ones_like(input_ids[:, start:])
        output = self.model(ids, attention_mask=mask, use_cache=True, **{CACHE_NAME: self.cache})
        self.cache = output[CACHE_NAME]
        plain = output.logits[:, -1]
        return plain + self.scale * (scores - plain)


def write_lumina(model: PreTrainedModel, form: PictureForm, **options: Any) -> Any:
    torch.manual_seed(0)
    given = [BEGIN, *SIZES] if form.raster.head == 0 else []
    ids = torch.cat([IDS[:, :-1], torch.tensor([given] * len(IDS), dtype=torch.long).view(len(IDS), -1)], 1)
    mask = torch.cat([MASK[:, :-1], torch.ones_like(ids[:, 5:])], 1)
    allowed = Constraint(form.raster, ids.shape[1], [END_IMAGE, END], [BEGIN, *SIZES])
    tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=form.raster.tokens, do_sample=True,
                            top_k=20, prefix_allowed_tokens_fn=allowed,
                            logits_processor=LogitsProcessorList([Guidance(model, 3.0)]), **options)
    return tokens


@pytest.mark.parametrize("sized", [True, False])
def test_chameleon_draws_whole_pictures(lumina: PreTrainedModel, sized: bool) -> None:
    """Normalised queries and keys; begin of image and sizes given with the prompt, or drawn."""
    form = chameleon(ROWS, COLUMNS, sized=sized)
    assert form.raster == Raster(ROWS, COLUMNS, line_tokens=1, head=0 if sized else 3, tail=2)
    assert chameleon().raster.tokens == 2352 + 2 and chameleon(64, 64).raster.tokens == 4160 + 2
    expected = write_lumina(lumina, form)
    assert expected[0, -2:].tolist() == [END_IMAGE, END] and expected.unique().numel() > 12
    attach(lumina, "full", pictures=form)
    assert torch.equal(write_lumina(lumina, form), expected)
    choice = attach(lumina, budget=0.5, row_buffer=2, pictures=form)
    output = write_lumina(lumina, form, return_dict_in_generate=True)
    assert not torch.equal(output.sequences, expected)
    prompt = 5 + (3 if sized else 0)
    taken = {cache.nbytes for cache in caches(lumina)}
    assert choice.nbytes(len(IDS), prompt) in taken and choice.nbytes() < choice.full_nbytes()
    detach(lumina)
    assert torch.equal(write_lumina(lumina, form), expected)
