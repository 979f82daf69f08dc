"""Which slots an engine draws in when pictures join and leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ssd_attach.online import OnlinePlan
from ssd_kernels import backends
from ssd_kernels.arguments import check_int
from ssd_kernels.noise import in_one_launch
from ssd_kernels.sampling import MAX_CODES

from .capture import CAPTURABLE
from .one_cache import OneCache
from .own_caches import OwnCaches
from .slots import Slots

if TYPE_CHECKING:
    from .engine import Engine

MAX_PROMPT = 128


def slots(engine: Engine, capacity: int, max_prompt: int | None, steps: int | None, any_plan: bool) -> Slots:
    """Slots of an engine. They read its model's weights as they are now.

    Where a step can be captured, one cache holds all slots, and is there from now on. Elsewhere every picture brings
    its own.

    Args:
        engine: that says what caches keep and how products are computed.
        capacity: most pictures at once.
        max_prompt: tokens of the longest prompt; None for `MAX_PROMPT`, or fewer if the model takes no more.
        steps: tokens of every picture; None for whole pictures.
        any_plan: pictures may bring plans of their own. Then every one brings its cache on any device, and no step is
            captured.

    Raises:
        TypeError, ValueError: an argument is wrong, or the plan types heads by what all pictures see.
        MemoryError: the cache does not fit.
    """
    whole = engine.shape.num_visual_tokens
    limit = engine.model.model.language_model.config.max_position_embeddings - whole
    max_prompt = min(MAX_PROMPT, limit) if max_prompt is None else max_prompt
    if check_int("max_prompt", max_prompt, 1) > limit:
        raise ValueError(f"max_prompt must be within 1 .. {limit}, got {max_prompt}")
    if steps is not None and check_int("steps", steps, 1) > whole:
        raise ValueError(f"steps must be within 1 .. {whole}, got {steps}")
    check_int("capacity", capacity, 1)
    if isinstance(engine.plan, OnlinePlan):
        raise ValueError("plan must not be an OnlinePlan, which types heads by a whole batch: pictures that join would "
                         "depend on each other")
    device = engine.device
    resolved = backends.resolve(engine.backend, device, engine.dtype, engine.shape.head_dim, engine.plan.kv_format)
    codes = engine.model.model.generation_head.vision_head.out_features
    together = not any_plan and in_one_launch(device) and resolved.name in CAPTURABLE and codes <= MAX_CODES
    with torch.inference_mode(False), torch.no_grad():  # another thread, in another mode, may draw in them
        return (OneCache if together else OwnCaches)(engine, capacity, max_prompt, whole if steps is None else steps)
