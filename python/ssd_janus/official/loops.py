"""Compressed caches for loops over models of DeepSeek's code, which stay as they are: its scripts and training code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

import ssd_attach
from ssd_attach import Choice, PictureForm
from ssd_attach.cache import generation_of
from ssd_attach.coupling import cache_for
from ssd_attach.internals import CACHE_NAME
from ssd_kernels import CachePlan
from ssd_kernels.policies import Raster
from ssd_kernels.reading import Field

from ..engine.rollout import Recording, Rollout
from ..engine.sampling import GeneratorNoise, Sampling
from .live import check_official, image_size
from .weights import token_pixels


def enable(model: Any, plan: CachePlan | str | None = None, backend: str = "auto", **options: Any) -> Choice:
    """Let every loop over an official model keep its KV cache under a plan while it draws.

    A call of ``model.language_model.model`` with ``use_cache=True`` and no cache is the prompt of pictures; the cache
    in its output is compressed, and calls that pass it on are their steps. Rows may come in any order, conditional and
    unconditional ones in turn as in DeepSeek's loops. A prompt may have a mask, which may differ from row to row: what
    the last token does not see is not stored, and positions count it all the same, as in the loops without this. Calls
    of ``model.language_model`` itself are text and left alone, as are calls without a cache, such as training's.

    Args, Returns, Raises: as `ssd_attach.attach`, for a model of which `is_official` is true.
    """
    check_official(model)
    return ssd_attach.attach(model.language_model, plan, backend, pictures=PictureForm(_raster(model), _never),
                             **options)


def disable(model: Any) -> None:
    """Undo `enable`; nothing is left.

    Raises:
        TypeError: another kind of model.
    """
    check_official(model)
    ssd_attach.detach(model.language_model)


@torch.no_grad()
def rollout(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, samples: int = 1, *, pad_token_id: int,
            guidance: float = 5.0, sampling: Sampling | None = None, steps: int | None = None) -> Rollout:
    """What the generation block of public training code does (T2I-R1's and those made from it), and how likely the
    tokens were: samples of prompts that are padded, with begin-of-image after the padding.

    Their prompts have positions in which padding counts, also within a prompt, so that tokens and log-probabilities are
    those of the training pass over the same ids and mask. The unconditional row of a picture has padding tokens for all
    but its prompt's first and last token and attends to all of them. Noise is drawn from torch's own generator as
    `torch.multinomial` draws it. Caches are compressed if the model is enabled (`enable`), and the model's own if not.
    Compressed ones hold equal prompts once, padding included, if their plan keeps prompts: that of a prompt's samples,
    and all unconditional ones that begin and end alike. These also run once.

    Args:
        model: an official model, as it is unwrapped to generate with.
        input_ids: long [prompts, P], begin-of-image in the last column.
        attention_mask: [prompts, P], 0 or False where there is padding.
        samples: pictures of each prompt.
        pad_token_id: of the unconditional rows.
        guidance: scale of classifier-free guidance; up to 1 there are no unconditional rows.
        sampling: None for the full distribution.
        steps: tokens per picture; None for whole pictures.

    Raises:
        TypeError: another kind of model, ids that are no long tensor, or ``guidance`` or ``sampling`` is none.
        ValueError: ids and mask are empty or not of one shape, a row of the mask is all padding, ``guidance`` is not
            finite, or ``samples``, ``steps`` or ``pad_token_id`` is no int within its limits.
    """
    check_official(model)
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype != torch.long:
        raise TypeError(f"input_ids must be a tensor of int64, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.dim() != 2 or not input_ids.numel() or getattr(attention_mask, "shape", None) != input_ids.shape:
        raise ValueError(f"input_ids and attention_mask must both be [prompts, P] and not empty, got "
                         f"{list(input_ids.shape)} and {list(getattr(attention_mask, 'shape', []))}")
    if not bool(attention_mask.bool().any(1).all()):
        raise ValueError("attention_mask must leave at least one token in every row")
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
        raise TypeError(f"guidance must be a number, got {guidance!r}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if sampling is not None and not isinstance(sampling, Sampling):
        raise TypeError(f"sampling must be a Sampling or None, got {type(sampling).__name__}")
    whole, vocabulary = _raster(model).tokens, len(model.language_model.get_input_embeddings().weight)
    steps = whole if steps is None else steps
    for name, value, least, most in (("samples", samples, 1, 2**31), ("steps", steps, 1, whole),
                                     ("pad_token_id", pad_token_id, 0, vocabulary - 1)):
        Field(value, name).integer(least, most)
    ids, mask = (tensor.repeat_interleave(samples, 0) for tensor in (input_ids, attention_mask))
    rows = 2 if guidance > 1 else 1
    ids, mask = ids.repeat_interleave(rows, 0), mask.repeat_interleave(rows, 0)
    if rows == 2:
        ids[1::2, 1:-1] = pad_token_id
        mask[1::2] = 1
    pictures, device = len(ids) // rows, input_ids.device
    record = Recording.of_pictures(sampling or Sampling(), pictures, steps, device)
    noise = GeneratorNoise(pictures, model.gen_head.vision_head.out_features, None, device)
    tokens = torch.empty(pictures, steps, dtype=torch.long, device=device)
    prompts, share = torch.cat([ids, mask.to(ids)], 1).unique(dim=0, return_inverse=True)
    cache = cache_for(model.language_model, share.tolist())
    seen = mask
    if cache is not None:
        ids, seen = prompts.tensor_split(2, 1)
    inputs = model.language_model.get_input_embeddings()(ids)
    for step in range(steps):
        outputs = model.language_model.model(inputs_embeds=inputs, attention_mask=seen, use_cache=True,
                                             **{CACHE_NAME: cache})
        hidden = outputs.last_hidden_state[:, -1]
        if step == 0 and cache is not None:
            hidden = hidden[share]
        cache = getattr(outputs, CACHE_NAME)
        logits = model.gen_head(hidden).float()
        if rows == 2:
            logits = logits[1::2] + guidance * (logits[0::2] - logits[1::2])
        noise.prepare()
        tokens[:, step] = record.choose(logits, noise.values(record.column))
        inputs = model.prepare_gen_img_embeds(tokens[:, step].repeat_interleave(rows)).unsqueeze(1)
        seen = mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    generation = generation_of(cache)
    compressed = None if generation is None else generation.compressed
    return Rollout(tokens, record.drawn, record.plain, (pictures,), 0 if compressed is None else compressed.nbytes)


def _raster(model: Any) -> Raster:
    grid = image_size(model) // token_pixels(name for name, _ in model.named_parameters())
    return Raster(grid, grid)


def _never(call: Mapping[str, Any]) -> bool:
    """Whether a call of the language model, which has a text head, draws."""
    return False
