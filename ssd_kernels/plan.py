"""What every head keeps: head specs and plans, as plain data.

Plan files (`CachePlan.save`) carry a version. Fields and values that came later, ``pinned``, ``score="position"`` and
``score="decayed"``, are written only where a plan uses them, and readers refuse what they do not know. So a file of
the same version either means the same to an older reader or is refused by it, and the version stays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .files import write_atomically

__all__ = ["CachePlan", "HeadSpec", "peak_tokens"]

Kind = Literal["full", "window", "heavy"]
ScoreRule = Literal["sum", "mean", "position", "decayed"]

KINDS: tuple[str, ...] = ("full", "window", "heavy")
SCORE_RULES: tuple[str, ...] = ("sum", "mean", "position", "decayed")
DECAY = 0.96  # per decode step, of "decayed" scores: half is forgotten after 17 steps, less than a row of 24
PLAN_FORMAT = "ssd_kernels.plan"
PLAN_VERSION = 1
MAX_PINNED = 2**20  # per head; a slip in a range of a plan file must not fill the memory


def check_int(name: str, value: object, minimum: int) -> int:
    """``value`` as an int that is at least ``minimum``.

    Raises:
        TypeError: ``value`` is not an integer (bool does not count as one).
        ValueError: ``value`` is below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def _token_numbers(pinned: object) -> tuple[int, ...]:
    """``pinned`` as `HeadSpec` stores it: ascending, without duplicates."""
    if isinstance(pinned, (str, bytes)) or not isinstance(pinned, Iterable):
        raise TypeError(f"pinned must be an iterable of ints, got {pinned!r}")
    tokens = sorted({check_int(f"pinned[{entry}]", token, 0) for entry, token in enumerate(pinned)})
    if len(tokens) > MAX_PINNED:
        raise ValueError(f"pinned must hold at most {MAX_PINNED} tokens, got {len(tokens)}")
    return tuple(tokens)


def _to_ranges(tokens: Sequence[int]) -> list[list[int]]:
    """Ascending ``tokens`` as ``[first, last]`` pairs, both inclusive."""
    ranges: list[list[int]] = []
    for token in tokens:
        if ranges and token == ranges[-1][1] + 1:
            ranges[-1][1] = token
        else:
            ranges.append([token, token])
    return ranges


def _from_ranges(ranges: object) -> list[int]:
    """The tokens that `_to_ranges` described.

    Raises:
        TypeError, ValueError: not a list of ``[first, last]`` pairs of ints >= 0 with first <= last, in ascending
            order and without overlap.
    """
    if not isinstance(ranges, list):
        raise ValueError(f"pinned must be a list of [first, last] ranges, got {ranges!r}")
    tokens: list[int] = []
    for entry, pair in enumerate(ranges):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"pinned[{entry}] must be a range [first, last], got {pair!r}")
        first = check_int(f"first of pinned[{entry}]", pair[0], tokens[-1] + 1 if tokens else 0)
        last = check_int(f"last of pinned[{entry}]", pair[1], first)
        if len(tokens) + last - first >= MAX_PINNED:
            raise ValueError(f"pinned must hold at most {MAX_PINNED} tokens, got {len(tokens) + last - first + 1}")
        tokens.extend(range(first, last + 1))
    return tokens


@dataclass(frozen=True)
class HeadSpec:
    """What one KV head keeps (docs/specification.md, section 2). Build it with `full`, `window` or `heavy`.

    Attributes:
        kind: ``"full"``, ``"window"`` or ``"heavy"``.
        size: W of a window head or M of a heavy head, in visual tokens; None for a full head.
        recent: how many of a heavy head's M tokens are the newest ones, whatever their score.
        score: eviction key of a heavy head: ``"sum"`` of the attention probability the token received,
            ``"mean"`` of it over the decode steps in which the token was attended to, the token's
            ``"position"`` (newest wins; the probabilities are still summed, but do not decide), or ``"decayed"``:
            the sum, of which every step keeps the share `DECAY` before it adds.
        pinned: visual tokens of a heavy head, by their number t in the picture, that rank above all that are not
            pinned, whatever their key; the older of two pinned tokens is evicted first. Any iterable of ints >= 0,
            stored ascending and without duplicates. Numbers beyond the picture have no effect.
    """

    kind: Kind
    size: int | None = None
    recent: int = 0
    score: ScoreRule = "sum"
    pinned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pinned", _token_numbers(self.pinned))
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "full":
            if self.size is not None:
                raise ValueError(f"size must be None for a full head, got {self.size!r}")
        else:
            check_int(f"size of a {self.kind} head", self.size, 1 if self.kind == "heavy" else 0)
        check_int("recent", self.recent, 0)
        if self.score not in SCORE_RULES:
            raise ValueError(f"score must be one of {', '.join(SCORE_RULES)}, got {self.score!r}")
        if self.kind != "heavy" and (self.recent != 0 or self.score != "sum" or self.pinned):
            raise ValueError(f"recent, score and pinned belong to heavy heads only, got a {self.kind} head with "
                             f"recent={self.recent}, score={self.score!r}, {len(self.pinned)} pinned tokens")
        if self.size is not None and self.recent > self.size:
            raise ValueError(f"recent must be at most M = {self.size}, got {self.recent}")

    @classmethod
    def full(cls) -> HeadSpec:
        """Keep every token: ordinary dense attention."""
        return cls("full")

    @classmethod
    def window(cls, size: int) -> HeadSpec:
        """Keep the ``size`` (W >= 0) newest visual tokens: a *spatial* head of SSD (arXiv 2510.18716, Algorithm 1)."""
        return cls("window", size)

    @classmethod
    def heavy(cls, size: int, recent: int = 0, score: ScoreRule = "sum", pinned: Iterable[int] = ()) -> HeadSpec:
        """Keep the ``size`` (M >= 1) heaviest visual tokens: a *semantic* head of SSD (Algorithm 1).

        The ``recent`` newest tokens stay, then pinned ones, then those of highest key, until M are kept.

        Args:
            size: M, the number of visual tokens kept.
            recent: how many of the M are the newest tokens regardless of score; 0 is the paper's rule.
            score: ``"sum"`` (the paper's running sum), ``"mean"`` per decode step, so that old tokens do not
                starve new ones, ``"decayed"``, a sum that forgets half in 17 steps, for the same reason, or
                ``"position"``: the newest tokens, with scores kept beside.
            pinned: numbers t of visual tokens that rank above all others, as the margin columns of a grid may.
        """
        return cls("heavy", size, recent, score, _token_numbers(pinned))

    def to_dict(self) -> dict[str, Any]:
        """JSON form: only the fields that mean something for this kind.

        ``pinned`` is there when it is not empty, as a list of ``[first, last]`` ranges, both inclusive, ascending.
        """
        if self.kind == "full":
            return {"kind": "full"}
        if self.kind == "window":
            return {"kind": "window", "size": self.size}
        data: dict[str, Any] = {"kind": "heavy", "size": self.size, "recent": self.recent, "score": self.score}
        if self.pinned:
            data["pinned"] = _to_ranges(self.pinned)
        return data

    @classmethod
    def from_dict(cls, data: object) -> HeadSpec:
        """The head spec that `to_dict` wrote.

        Raises:
            ValueError: not an object, an unknown kind or field, or a value outside its range; ranges of ``pinned``
                that overlap or are out of order.
            TypeError: a size or a token number that is not an integer.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a head spec must be an object, got {data!r}")
        unknown = sorted(set(data) - {"kind", "size", "recent", "score", "pinned"})
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r} in head spec {dict(data)!r}")
        if "kind" not in data:
            raise ValueError(f"kind is missing in head spec {dict(data)!r}")
        return cls(**{**data, "pinned": _from_ranges(data.get("pinned", []))})


def peak_tokens(keep: int | None, first: int, num_visual_tokens: int, row_buffer: int) -> int:
    """Largest number of evictable tokens a head ever holds, the newest one before its eviction included.

    Tokens are evicted down to ``keep`` at the end of every block of ``max(row_buffer, 1)`` steps
    (docs/specification.md, section 3.4).

    Args:
        keep: W or M; None keeps everything.
        first: evictable tokens present before the first step (the prompt when it is not kept for good, else 0).
        num_visual_tokens: decode steps of a whole picture.
        row_buffer: R, in steps.
    """
    if keep is None:
        return first + num_visual_tokens
    period = max(row_buffer, 1)
    # The count only ever falls at block ends, so its maximum is at the end of the last whole block or of the rest.
    last_whole = num_visual_tokens // period * period
    starts_and_ends = [(last_whole, num_visual_tokens)]
    if last_whole:
        starts_and_ends.append((last_whole - period, last_whole))
    return max(min(keep, first + start) + end - start for start, end in starts_and_ends)


@dataclass(frozen=True, init=False)
class CachePlan:
    """Head specs for every layer and KV head, plus when to evict and whether the prompt is protected.

    Attributes:
        layers: ``[num_layers][num_heads]`` head specs; every layer has the same number of KV heads.
        row_buffer: R in steps; 0 evicts at every step, 24 is the paper's row buffer for a 24 x 24 picture.
        keep_prompt: prompt tokens are never evicted and not counted in W or M.
    """

    layers: tuple[tuple[HeadSpec, ...], ...]
    row_buffer: int
    keep_prompt: bool

    def __init__(self, layers: Sequence[Sequence[HeadSpec]], row_buffer: int = 0, keep_prompt: bool = True) -> None:
        """
        Raises:
            TypeError: an entry is not a `HeadSpec`, or ``row_buffer`` / ``keep_prompt`` has another type.
            ValueError: no layer, no head, layers of different lengths, or a negative ``row_buffer``.
        """
        try:
            frozen = tuple(tuple(heads) for heads in layers)
        except TypeError:
            raise TypeError(f"layers must be a sequence of sequences of HeadSpec, got {layers!r}") from None
        if not frozen or not frozen[0]:
            raise ValueError("layers must hold at least one layer with at least one head, got none")
        for index, heads in enumerate(frozen):
            if len(heads) != len(frozen[0]):
                raise ValueError(f"layers must all have the same number of heads: layer 0 has {len(frozen[0])}, "
                                 f"layer {index} has {len(heads)}")
            for head, spec in enumerate(heads):
                if not isinstance(spec, HeadSpec):
                    raise TypeError(f"layers[{index}][{head}] must be a HeadSpec, got {spec!r}")
        check_int("row_buffer", row_buffer, 0)
        if not isinstance(keep_prompt, bool):
            raise TypeError(f"keep_prompt must be a bool, got {keep_prompt!r}")
        object.__setattr__(self, "layers", frozen)
        object.__setattr__(self, "row_buffer", row_buffer)
        object.__setattr__(self, "keep_prompt", keep_prompt)

    @classmethod
    def uniform(cls, spec: HeadSpec, num_layers: int, num_heads: int, row_buffer: int = 0,
                keep_prompt: bool = True) -> CachePlan:
        """The same head spec for every one of ``num_layers`` x ``num_heads`` KV heads."""
        check_int("num_layers", num_layers, 1)
        check_int("num_heads", num_heads, 1)
        return cls([[spec] * num_heads] * num_layers, row_buffer, keep_prompt)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """KV heads per layer."""
        return len(self.layers[0])

    def budget(self, num_visual_tokens: int = 576) -> float:
        """Mean over heads of the largest number of visual slots a head ever holds, over ``num_visual_tokens``.

        The row buffer is counted, and so is the slot of the new token that a step appends before it evicts
        (docs/specification.md, section 2).
        """
        check_int("num_visual_tokens", num_visual_tokens, 1)
        peaks = [peak_tokens(spec.size, 0, num_visual_tokens, self.row_buffer)
                 for heads in self.layers for spec in heads]
        return sum(peaks) / len(peaks) / num_visual_tokens

    def nbytes(self, *, batch_size: int, head_dim: int, max_prompt: int, dtype: torch.dtype,
               num_visual_tokens: int = 576) -> int:
        """Bytes a `CompressedCache` of this plan allocates: slabs, scores, positions, cursors, tables and masks."""
        from .layout import LayerLayout

        check_int("batch_size", batch_size, 1)
        check_int("head_dim", head_dim, 1)
        return sum(LayerLayout.build(heads, self, max_prompt, num_visual_tokens).nbytes(batch_size, head_dim, dtype)
                   for heads in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, as `save` writes them."""
        return {"format": PLAN_FORMAT, "version": PLAN_VERSION, "row_buffer": self.row_buffer,
                "keep_prompt": self.keep_prompt,
                "layers": [[spec.to_dict() for spec in heads] for heads in self.layers]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON. The file appears whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        write_atomically(Path(path), lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CachePlan:
        """Read a plan that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, another format or version, unknown or missing fields, ragged layers, a head spec
                out of range. The message names the file and the field.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(data)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"plan file {os.fspath(path)}: {error}") from error

    @classmethod
    def from_dict(cls, data: object) -> CachePlan:
        """The plan that `to_dict` described.

        Raises:
            TypeError, ValueError: as `load`, without the file's name.
        """
        if not isinstance(data, dict):
            raise ValueError(f"must hold a JSON object, got {type(data).__name__}")
        fields = {"format", "version", "row_buffer", "keep_prompt", "layers"}
        for name in sorted(fields - set(data)):
            raise ValueError(f"{name} is missing")
        for name in sorted(set(data) - fields):
            raise ValueError(f"unknown field {name!r}")
        if data["format"] != PLAN_FORMAT:
            raise ValueError(f"format must be {PLAN_FORMAT!r}, got {data['format']!r}")
        if data["version"] != PLAN_VERSION or isinstance(data["version"], bool):
            raise ValueError(f"version must be {PLAN_VERSION}, got {data['version']!r}")
        if not isinstance(data["layers"], list) or not all(isinstance(heads, list) for heads in data["layers"]):
            raise ValueError("layers must be a list of lists of head specs")
        layers = [[HeadSpec.from_dict(spec) for spec in heads] for heads in data["layers"]]
        return cls(layers, data["row_buffer"], data["keep_prompt"])
