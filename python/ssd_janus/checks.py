"""Checks of what is given to a `Pipeline`: errors name the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_prompts(prompts: object) -> list[str]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a text or a sequence of texts, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts must hold at least one text, got none")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{index}] must be a text, got {prompt!r}")
        if not prompt.strip():
            raise ValueError(f"prompts[{index}] must not be blank, got {prompt!r}")
    return list(prompts)


def check_number(name: str, value: object, kind: type, minimum: float, maximum: float = 2**62) -> None:
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {'an int' if kind is int else 'a number'}, got {value!r}")
    if not minimum <= value <= maximum:
        limit = f"at least {minimum}" if maximum == 2**62 and not value > maximum else f"within {minimum} .. {maximum}"
        raise ValueError(f"{name} must be {limit}, got {value}")


def sampling_options(temperature: float | None, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    """Options of ``generate``; those left at None stay the model's own."""
    if temperature is not None:
        check_number("temperature", temperature, float, 0)
    if top_k is not None:
        check_number("top_k", top_k, int, 0)
    if top_p is not None:
        check_number("top_p", top_p, float, 0, 1)
        if top_p == 0:
            raise ValueError("top_p must be above 0, got 0")
    if temperature == 0:
        return {"do_sample": False}
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return {"do_sample": True, **{name: value for name, value in given.items() if value is not None}}
