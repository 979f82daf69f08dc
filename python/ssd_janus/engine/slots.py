"""Pictures that join and leave while others are drawn: the device's side of continuous batching.

A picture has the tokens that `Engine.generate` draws of it alone, as far as the engine is ``exact``.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from ssd_attach.online import OnlinePlan
from ssd_kernels import CachePlan, CompressedCache

from .layers import Layers, PromptGroup, grouped
from .sampling import Noise, Sampling
from .unconditional import unconditional_prompt

if TYPE_CHECKING:
    from .engine import Engine

Kept = tuple[PromptGroup, int, torch.Tensor, torch.Tensor]  # group, layer, keys and values of its prompts


@dataclass(frozen=True)
class PictureRequest:
    """One picture.

    Attributes:
        prompt: token numbers, begin-of-image included.
        guidance: scale; up to 1 there is none, and a picture takes one row instead of two.
        seed: of its random numbers.
        sampling: how its tokens are chosen.
        plan: what its cache keeps; None for the engine's plan. Others need slots that take them (`Slots.any_plan`).
    """

    prompt: Sequence[int]
    guidance: float = 5.0
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    plan: CachePlan | None = None

    @property
    def guided(self) -> bool:
        return self.guidance > 1


@dataclass
class Picture:
    """A picture in its slot.

    Attributes:
        slot: its number.
        request: what is drawn.
        done: tokens drawn.
        cache, noise: its own, on `OwnCaches`.
    """

    slot: int
    request: PictureRequest
    done: int = 0
    cache: CompressedCache | None = None
    noise: Noise | None = None


@dataclass(frozen=True)
class Lineup:
    """Pictures side by side, as `Batch` has them: guided ones first, and their unconditional rows after all others.

    Attributes:
        pictures: in this order; ``rows``: of theirs.
        slots: long [pictures].
        scale: float32 [guided].
        picture_of_row: long [padded rows].
        samplings: how tokens are chosen, and of which pictures, long; None: of all.
    """

    pictures: Sequence[Picture]
    rows: int
    slots: torch.Tensor
    scale: torch.Tensor
    picture_of_row: torch.Tensor
    samplings: Sequence[tuple[Sampling, torch.Tensor | None]]

    @classmethod
    def of(cls, pictures: Sequence[Picture], layers: Layers) -> Lineup:
        """Of pictures in any order."""
        device = layers.weights.device
        ordered = sorted(pictures, key=lambda picture: not picture.request.guided)
        scales = [picture.request.guidance for picture in ordered if picture.request.guided]
        rows = len(ordered) + len(scales)
        numbers = [*range(len(ordered)), *range(len(scales))] + [0] * (layers.padded(rows) - rows)
        alike: dict[object, list[int]] = {}
        for index, picture in enumerate(ordered):
            sampling = picture.request.sampling
            kind = "greedy" if sampling.greedy else sampling.numbers or id(sampling)
            alike.setdefault(kind, []).append(index)
        return cls(ordered, rows, torch.tensor([picture.slot for picture in ordered], device=device),
                   torch.tensor(scales, dtype=torch.float32, device=device), torch.tensor(numbers, device=device),
                   [(ordered[indices[0]].request.sampling, None if len(alike) == 1
                     else torch.tensor(indices, device=device)) for indices in alike.values()])


class Joining:
    """Pictures whose prompts are being run, a part at a time, in slots that are taken already."""

    def __init__(self, slots: Slots, pictures: Sequence[Picture]) -> None:
        self.pictures, self.joined = pictures, False
        self._slots = slots
        self._work = self._run()

    def advance(self, tokens: float | None = None) -> bool:
        """Run prompts until about ``tokens`` of them have passed all layers, at least a part; None: to the end.

        Returns:
            whether all have joined, with their first tokens drawn. If anything fails, the slots are free again.
        """
        spent = 0.0
        try:
            while not self.joined and (tokens is None or spent < tokens):
                part = next(self._work, None)
                self.joined = part is None
                spent += part or 0.0
        except BaseException:
            self.abandon()
            raise
        return self.joined

    def abandon(self) -> None:
        """Give the slots back."""
        self._work.close()
        for picture in self.pictures:
            self._slots.leave(picture.slot)

    def _run(self) -> Generator[float, None, None]:
        slots, kept = self._slots, list[Kept]()
        lineup = Lineup.of(self.pictures, slots.layers)
        prompts = [picture.request.prompt for picture in lineup.pictures]
        prompts += [slots.unconditional(prompt) for prompt in prompts[:len(lineup.scale)]]
        last = slots.weights.embed.new_zeros(len(lineup.picture_of_row), slots.weights.embed.shape[1],
                                             dtype=slots.weights.dtype)
        slots.prepare(lineup)
        for group in grouped(prompts, slots.layers.chunk):

            def store(layer: int, keys: torch.Tensor, values: torch.Tensor, group: PromptGroup = group) -> None:
                slots.store(lineup, (group, layer, keys, values), kept)

            hidden = yield from slots.layers.prompts(group, slots.dtype, store)
            last.index_copy_(0, torch.tensor(group.rows, device=last.device), hidden)
        slots.start(lineup, last, kept)


class Slots(ABC):
    """Room for some pictures at once. For one thread.

    Attributes:
        capacity: pictures; ``max_prompt``: tokens of the longest prompt; ``steps``: tokens of every picture.
        any_plan: pictures may bring plans of their own.
        max_cache_bytes: that caches of pictures should take together: of ``capacity`` pictures with the engine's plan,
            or of one that keeps everything.
        free: slots that nobody has, the lowest first (a heap).
        running: pictures that have joined, by their slots.
        tokens: long [capacity, steps + 1], on the device; the last column is nobody's.
    """

    any_plan: ClassVar[bool]

    def __init__(self, engine: Engine, capacity: int, max_prompt: int, steps: int) -> None:
        self.engine, self.capacity, self.max_prompt, self.steps = engine, capacity, max_prompt, steps
        self.weights = engine.weights(max_prompt + engine.shape.num_visual_tokens)
        self.layers = Layers(self.weights, row_multiple=engine.row_multiple, compiled=engine.compile)
        self.dtype = engine.dtype
        self.free = list(range(capacity))
        self.running: dict[int, Picture] = {}
        self.tokens = torch.zeros(capacity, steps + 1, dtype=torch.long, device=self.weights.device)
        self.max_cache_bytes = max(capacity * self._bytes_of(engine.plan, 2, max_prompt),
                                   self._bytes_of(engine.shape.full_plan(), 2, max_prompt))

    def plan_of(self, request: PictureRequest) -> CachePlan:
        """That a picture is drawn with."""
        return self.engine.plan if request.plan is None else request.plan

    def cache_bytes(self, request: PictureRequest, plan: CachePlan | None = None) -> int:
        """Bytes of a cache for this picture alone; with ``plan`` in place of its own."""
        return self._bytes_of(plan or self.plan_of(request), 1 + request.guided, len(request.prompt))

    def check(self, request: PictureRequest) -> None:
        """Raise TypeError or ValueError unless such a picture can be drawn here."""
        if isinstance(request.guidance, bool) or not isinstance(request.guidance, (int, float)):
            raise TypeError(f"guidance must be a number, got {request.guidance!r}")
        if isinstance(request.seed, bool) or not isinstance(request.seed, int):
            raise TypeError(f"seed must be an int, got {request.seed!r}")
        self.engine._request([request.prompt], request.guidance, [request.seed], None, request.sampling, None)
        if len(request.prompt) > self.max_prompt:
            raise ValueError(f"prompt must be at most max_prompt = {self.max_prompt} tokens long, got "
                             f"{len(request.prompt)}")
        if request.plan is not None and request.plan != self.engine.plan:
            if not self.any_plan:
                raise ValueError("plan must be None or the engine's, for one cache holds all slots; slots(..., "
                                 "any_plan=True) takes others")
            if not isinstance(request.plan, CachePlan) or isinstance(request.plan, OnlinePlan):
                raise TypeError(f"plan must be a CachePlan that is known beforehand, got "
                                f"{type(request.plan).__name__}")
            self.engine.shape.check(request.plan)

    def join(self, requests: Sequence[PictureRequest]) -> Joining:
        """Take slots for pictures, whose prompts the caller then runs with `Joining.advance`.

        Raises:
            TypeError, ValueError: one of them cannot be drawn, or there are not so many slots; nothing has changed.
        """
        for request in requests:
            self.check(request)
        if len(requests) > len(self.free):
            raise ValueError(f"requests must be at most {len(self.free)}, as many as slots are free, got "
                             f"{len(requests)}")
        return Joining(self, [Picture(heapq.heappop(self.free), request) for request in requests])

    def leave(self, slot: int) -> None:
        """Free a slot, whether its picture is done or not."""
        self.running.pop(slot, None)
        heapq.heappush(self.free, slot)
        self._empty(slot)

    @torch.no_grad()
    def step(self) -> None:
        """Draw the next token of every running picture; those that are done must have left."""
        self._step()
        for picture in self.running.values():
            picture.done += 1

    def drawn(self, slot: int) -> torch.Tensor:
        """Tokens of a running picture so far, long [tokens] on the CPU."""
        return self.tokens[slot, :self.running[slot].done].cpu().clone()

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        """See `unconditional_prompt`."""
        return unconditional_prompt(self.engine.model.generation_config, prompt)

    @torch.no_grad()
    def start(self, lineup: Lineup, last: torch.Tensor, kept: Sequence[Kept]) -> None:
        """Draw the first tokens of pictures from the last hidden states [padded rows, hidden] of their prompts."""
        self._first(lineup, self.layers.logits(last, lineup.rows), kept)
        for picture in lineup.pictures:
            picture.done = 1
            self.running[picture.slot] = picture

    def _bytes_of(self, plan: CachePlan, rows: int, max_prompt: int) -> int:
        shape = self.engine.shape
        return plan.nbytes(batch_size=rows, head_dim=shape.head_dim, max_prompt=max_prompt, dtype=self.dtype,
                           num_visual_tokens=shape.num_visual_tokens)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the caches that are held now."""

    @abstractmethod
    def prepare(self, lineup: Lineup) -> None:
        """Before the prompts of joining pictures."""

    @abstractmethod
    def store(self, lineup: Lineup, part: Kept, kept: list[Kept]) -> None:
        """Take keys and values of prompts, or keep them for `start`."""

    @abstractmethod
    def _first(self, lineup: Lineup, logits: torch.Tensor, kept: Sequence[Kept]) -> None:
        """First tokens of the logits [rows, codes]."""

    @abstractmethod
    def _empty(self, slot: int) -> None:
        """Nothing is left of the slot's picture."""

    @abstractmethod
    def _step(self) -> None:
        """The next token of all."""
