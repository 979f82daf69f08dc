"""`HeadSpec`: what one KV head keeps, as plain data."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, NoReturn

from .arguments import check_int
from .reading import Field, naming, shown

__all__ = ["DECAY", "MAX_PINNED", "SCORE_RULES", "HeadSpec", "ScoreRule"]

Kind = Literal["full", "window", "heavy"]
ScoreRule = Literal["sum", "mean", "position", "decayed"]

KINDS: tuple[str, ...] = ("full", "window", "heavy")
SCORE_RULES: tuple[str, ...] = ("sum", "mean", "position", "decayed")
DECAY = 0.96  # per decode step, of "decayed" scores: half is forgotten after 17 steps, less than a row of 24
MAX_PINNED = 2**20  # per head; a slip in a range of a plan file must not fill the memory
MAX_PINNED_OF_ALL = 2**22  # of all heads of a plan; every token of every head of Janus-Pro-7B are 2**19


def _token_numbers(pinned: object) -> tuple[int, ...]:
    """``pinned`` as `HeadSpec` stores it: ascending, without duplicates."""
    if isinstance(pinned, (str, bytes)) or not isinstance(pinned, Iterable):
        raise TypeError(f"pinned must be an iterable of ints, got {shown(pinned)}")
    if isinstance(pinned, Sized) and len(pinned) > MAX_PINNED:
        _refuse_pinned(len(pinned))
    pinned = tuple(islice(pinned, MAX_PINNED + 1))
    if set(map(type, pinned)) - {int} or min(pinned, default=0) < 0:
        for entry, token in enumerate(pinned):
            check_int(f"pinned[{entry}]", token, 0)
    if len(pinned) > MAX_PINNED:
        _refuse_pinned(f"{MAX_PINNED + 1} or more")
    ascending = all(map(operator.lt, pinned, pinned[1:]))
    return pinned if ascending else tuple(sorted(set(pinned)))


def _refuse_pinned(count: object) -> NoReturn:
    raise ValueError(f"pinned must hold at most {MAX_PINNED} tokens, got {count}")


def _to_ranges(tokens: Sequence[int]) -> list[list[int]]:
    """Ascending ``tokens`` as ``[first, last]`` pairs, both inclusive."""
    ranges: list[list[int]] = []
    for token in tokens:
        if ranges and token == ranges[-1][1] + 1:
            ranges[-1][1] = token
        else:
            ranges.append([token, token])
    return ranges


def _from_ranges(field: Field, left: int) -> tuple[int, ...]:
    """The tokens that `_to_ranges` described.

    Args:
        left: what the heads before have left of `MAX_PINNED_OF_ALL`.

    Raises:
        ValueError: not a list of ``[first, last]`` pairs of ints >= 0 with first <= last, in ascending order and
            without overlap, or too many tokens.
    """
    ranges: list[range] = []
    count, least = 0, 0
    for pair in field.items():
        if type(pair.value) is not list or len(pair.value) != 2:
            pair.refuse("a range [first, last]")
        first, last = pair.items()
        ranges.append(range(first.integer(least), last.integer(first.value) + 1))
        count, least = count + last.value + 1 - first.value, last.value + 1
        if count > min(left, MAX_PINNED):
            raise ValueError(f"{field.name} must hold at most {MAX_PINNED} tokens, and with the heads before it at "
                             f"most {MAX_PINNED_OF_ALL}, got {MAX_PINNED_OF_ALL - left} and {count} or more")
    return tuple(chain.from_iterable(ranges))


@dataclass(frozen=True)
class HeadSpec:
    """What one KV head keeps (docs/specification.md). Build it with `full`, `window` or `heavy`.

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
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shown(self.kind)}")
        if self.kind == "full":
            if self.size is not None:
                raise ValueError(f"size must be None for a full head, got {shown(self.size)}")
        else:
            check_int(f"size of a {self.kind} head", self.size, 1 if self.kind == "heavy" else 0)
        check_int("recent", self.recent, 0)
        if self.score not in SCORE_RULES:
            raise ValueError(f"score must be one of {', '.join(SCORE_RULES)}, got {shown(self.score)}")
        if self.kind != "heavy" and (self.recent != 0 or self.score != "sum" or self.pinned):
            raise ValueError(f"recent, score and pinned belong to heavy heads only, got a {self.kind} head with "
                             f"recent={shown(self.recent)}, score={self.score!r}, {len(self.pinned)} pinned tokens")
        if self.size is not None and self.recent > self.size:
            raise ValueError(f"recent must be at most M = {shown(self.size)}, got {shown(self.recent)}")

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
            ValueError: not an object, an unknown kind or field, or a value of another type or outside its range;
                ranges of ``pinned`` that overlap or are out of order.
        """
        return cls.from_field(Field(data, "head spec"))

    @classmethod
    def from_field(cls, field: Field, left: int = MAX_PINNED_OF_ALL) -> HeadSpec:
        """As `from_dict`, with errors that name the field's place, and at most ``left`` pinned tokens."""
        members = field.members(["kind"], ["size", "recent", "score", "pinned"])
        kind = members["kind"].choice(KINDS)
        if kind != "full" and "size" in members:
            members["size"].integer(1 if kind == "heavy" else 0)
        values = {name: member.value for name, member in members.items()}
        if "recent" in members:
            members["recent"].integer(0)
        if "score" in members:
            members["score"].choice(SCORE_RULES)
        if "pinned" in members:
            values["pinned"] = _from_ranges(members["pinned"], left)
        with naming(field.name):
            return cls(**values)
