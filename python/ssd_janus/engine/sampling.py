"""From logits to tokens: what transformers' sampling does, for pictures that each have their own seed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import (
    ClassifierFreeGuidanceLogitsProcessor,
    GenerationConfig,
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ssd_attach.internals import logits_processors, prepared_config
from ssd_kernels.noise import exponential_, in_one_launch
from ssd_kernels.sampling import sample_in_one_launch

from ..checks import sampling_options

# Fields of a generation config that say how tokens are chosen; the further ones where they are set.
USUAL = ("temperature", "top_k", "top_p")
FURTHER = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size",
           "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values",
           "renormalize_logits")
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)


def sampling_settings(model: Any) -> dict[str, Any]:
    """What a model's generation config says about how tokens are chosen, JSON values, for those who compare results."""
    config = model.generation_config
    further = {name: value for name in FURTHER if (value := getattr(config, name, None)) not in (None, False)}
    greedy = {} if config.do_sample else {"do_sample": False}
    return {**{name: getattr(config, name, None) for name in USUAL}, **greedy,
            **json.loads(json.dumps(further, default=str))}


def set_sampling(model: Any, temperature: float | None = None, top_k: int | None = None,
                 top_p: float | None = None) -> None:
    """Make these the model's own defaults; what is None stays as it is.

    Args:
        temperature: 0 takes the likeliest token; above, tokens are drawn, also where the model's default is not to.
        top_k, top_p: restrict sampling, and say that tokens are drawn; 0 and 1 do not restrict.

    Raises:
        TypeError, ValueError: as `Pipeline.generate_tokens`.
    """
    if temperature is top_k is top_p is None:
        return
    for name, value in sampling_options(temperature, top_k, top_p).items():
        setattr(model.generation_config, name, value)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        greedy: take the likeliest token.
        warpers: transformers' own, applied in this order to guided logits [pictures, codes].
    """

    greedy: bool = False
    warpers: Sequence[Any] = field(default=())

    @classmethod
    def make(cls, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
        """
        Args:
            temperature: 0 is greedy.
            top_k, top_p: restrict sampling; 0 and 1 do not.

        Raises:
            ValueError: out of range.
        """
        if temperature == 0:
            return cls(greedy=True)
        warpers: list[Any] = [] if temperature == 1 else [TemperatureLogitsWarper(float(temperature))]
        if top_k != 0:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p != 1:
            warpers.append(TopPLogitsWarper(float(top_p)))
        return cls(warpers=warpers)

    @classmethod
    def of(cls, model: Any, config: GenerationConfig | None = None, **options: Any) -> Sampling:
        """What ``model.generate(generation_config=config, **options)`` would sample with.

        Raises:
            ValueError: it would use something that the engine does not know; the message names it.
        """
        return cls.of_config(model, prepared_config(model, config, **options)[0])

    @classmethod
    def of_config(cls, model: Any, config: GenerationConfig) -> Sampling:
        """As `of`, of a config in which nothing is left open."""
        config = copy.deepcopy(config)
        config.guidance_scale = None  # the engine guides each picture by its own scale
        found = logits_processors(model, config)
        for processor in found:
            if type(processor) not in WARPERS:
                raise ValueError(f"{type(processor).__name__} is in force")
        return cls(not config.do_sample, tuple(found))

    @property
    def numbers(self) -> tuple[float, int, float] | None:
        """Temperature, top-k and top-p, if that is all that restricts a draw, in this order; 1, 0 and 1 do not."""
        known = (("temperature", TemperatureLogitsWarper, 1.0), ("top_k", TopKLogitsWarper, 0),
                 ("top_p", TopPLogitsWarper, 1.0))
        order = [index for warper in self.warpers for index, (_, kind, _) in enumerate(known) if type(warper) is kind]
        plain = all(getattr(warper, "filter_value", -math.inf) == -math.inf
                    and getattr(warper, "min_tokens_to_keep", 1) == 1 for warper in self.warpers)
        if self.greedy or not plain or len(order) != len(self.warpers) or order != sorted(set(order)):
            return None
        values = [default for _, _, default in known]
        for index, warper in zip(order, self.warpers, strict=True):
            values[index] = getattr(warper, known[index][0])
        return values[0], values[1], values[2]

    def choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Tokens [N] of guided logits [N, codes] and noise [N, codes] of the exponential distribution.

        The largest of p_i / e_i with e_i ~ Exp(1) is i with probability p_i; `torch.multinomial` draws one sample in
        the same way, from the same random numbers.
        """
        for warper in self.warpers:
            logits = warper(None, logits)
        if self.greedy or noise is None:
            return logits.argmax(-1)
        return (logits.softmax(-1) / noise).argmax(-1)


class SampledByPicture(LogitsProcessor):
    """Makes a greedy ``model.generate`` of transformers sample, every picture with its own seed.

    It is given as the last of the call's logits processors. It guides, restricts and chooses as transformers would
    after it, and leaves the choice as the only code with a finite logit. torch's own generator, which other threads
    draw from, is not touched.
    """

    def __init__(self, model: Any, guidance: float, seeds: Sequence[int], **options: Any) -> None:
        """
        Args:
            guidance: scale; up to 1 there are no unconditional rows.
            seeds: one per picture.
            options: of ``generate``, about sampling.
        """
        config, _ = prepared_config(model, None, **options)
        config.guidance_scale = None
        found = logits_processors(model, config, [self])
        self.after = found[found.index(self) + 1:]
        if guidance > 1:
            self.after.insert(0, ClassifierFreeGuidanceLogitsProcessor(guidance))
        self.sampling = Sampling(greedy=not config.do_sample)
        self.seeds = seeds
        self.noise: Noise | None = None
        self.step: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for processor in self.after:
            scores = processor(input_ids, scores)
        noise = None if self.sampling.greedy else self._noise(scores)
        chosen = self.sampling.choose(scores, noise)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _noise(self, scores: torch.Tensor) -> torch.Tensor:
        """Of the next step, as the engine draws it."""
        if self.noise is None or self.step is None:
            self.noise = noise_for(*scores.shape, self.seeds, scores.device)
            self.step = torch.full((1,), -1, device=scores.device)
        self.step += 1
        self.noise.prepare()
        return self.noise.values(self.step)


class Noise(Protocol):
    """Exponential noise, fresh for every step."""

    def prepare(self) -> None:
        """What comes before a step and is no part of it, as a graph cannot hold it."""

    def values(self, step: torch.Tensor) -> torch.Tensor:
        """float32 [pictures, codes] of a step.

        Args:
            step: its number from 0, long [1] on the device.
        """


class GeneratorNoise:
    """Noise from generators of torch: a picture's numbers are those that transformers would draw for it alone."""

    def __init__(self, pictures: int, codes: int, seeds: Sequence[int] | None, device: torch.device) -> None:
        """
        Args:
            seeds: one per picture, or None to draw for all from torch's own generator, as transformers does.
        """
        self._values = torch.ones(pictures, codes, device=device)
        self._generators = None if seeds is None else [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def prepare(self) -> None:
        if self._generators is None:
            self._values.exponential_()
        else:
            for row, generator in zip(self._values, self._generators, strict=True):
                row.exponential_(generator=generator)

    def values(self, step: torch.Tensor) -> torch.Tensor:
        return self._values


class CountedNoise:
    """Noise by `ssd_kernels.noise`: of all pictures in one launch, which reads the step on the device.

    A picture's numbers do not depend on its batch. They are not those that transformers would draw on a GPU.
    """

    def __init__(self, codes: int, seeds: Sequence[int], device: torch.device) -> None:
        words = [signed(seed) for seed in seeds]
        self._codes, self._seeds = codes, torch.tensor(words, dtype=torch.long, device=device)
        self._values: torch.Tensor | None = None

    def prepare(self) -> None:
        pass

    def values(self, step: torch.Tensor) -> torch.Tensor:
        if self._values is None:
            self._values = torch.empty(len(self._seeds), self._codes, device=self._seeds.device)
        exponential_(self._values, self._seeds, step.expand(len(self._seeds)))
        return self._values

    def draw(self, logits: torch.Tensor, scale: torch.Tensor, step: torch.Tensor,
             numbers: tuple[float, int, float]) -> torch.Tensor:
        """Tokens [pictures] in one launch, guidance included; see `ssd_kernels.filters.sample`."""
        return sample_in_one_launch(logits, scale, self._seeds, step.expand(len(self._seeds)), *numbers)


def signed(seed: int) -> int:
    """A seed as a word of 64 bits with a sign: torch's generators take unsigned ones, too."""
    return (seed + 2**63) % 2**64 - 2**63


def noise_for(pictures: int, codes: int, seeds: Sequence[int] | None, device: torch.device) -> Noise:
    """The noise of pictures on a device; ``seeds`` as in `GeneratorNoise`."""
    if seeds is not None and in_one_launch(device):
        return CountedNoise(codes, seeds, device)
    return GeneratorNoise(pictures, codes, seeds, device)
