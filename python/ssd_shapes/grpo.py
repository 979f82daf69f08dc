"""GRPO with rollouts of `ssd_janus.engine`, from full or compressed caches (Shao et al., "DeepSeekMath", arXiv
2402.03300), and the correction for compressed ones of Sparse-RL (Luo et al., arXiv 2601.10079)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ssd_janus.engine import Engine, Sampling
from ssd_kernels import CachePlan
from ssd_kernels.files import write_atomically
from ssd_kernels.reading import Field, naming, read_json
from ssd_kernels.schema import count, list_of, mapping_of, maybe, number, object_of
from ssd_shapes import runs

VARIANTS = ("full", "uncorrected", "corrected")
GUIDANCE = 1.0  # without it a picture is one row, in the rollout and in training
LEAST_RATIO = 1e-4  # Sparse-RL's: a picture with a token below it is left out
FAR = 2.0  # ratios beyond this, or below its inverse, are counted
HELD_OUT_SEED = 2**40  # of pictures, out of the way of those trained on
ROWS = 8  # of a training pass
PARTS = ("rollout", "reward", "training")
MAX_RECORD = 2**24  # bytes

STEP = object_of({"step": count, "reward": number, "kl": maybe(lambda field: field.number()), "far": maybe(number),
                  "rejected": count, "trained": count, "cache_bytes": count, "seconds": mapping_of(number),
                  "cpu_seconds": mapping_of(number)})
MEASURE = object_of({"step": count, "full": number, "full_right": number, "compressed": number,
                     "compressed_right": number})
RECORD = object_of({"variant": lambda field: field.choice(VARIANTS), "seed": count, "digest": maybe(Field.string),
                    "steps": list_of(STEP), "held_out": list_of(MEASURE, 1)})

Wanted = Mapping[str, Any]
Asked = tuple[list[int], Wanted]  # a prompt's token numbers, and what the reward wants to know


@dataclass(frozen=True)
class Options:
    """What results depend on, beside model and seed."""

    steps: int
    prompts: int
    samples: int
    lr: float
    layers: int
    temperature: float
    cap: float
    measure_every: int


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        model: transformers' Janus, in float32.
        plan: of the compressed caches.
        draw: prompts of a seed and a step, as many as asked for.
        reward: float [N], 0 to 1, of tokens [N, T] and what is wanted of each.
        held_out: prompts to measure with.
    """

    model: Any
    plan: CachePlan
    draw: Callable[[int, int, int], list[Asked]]
    reward: Callable[[Tensor, Sequence[Wanted]], Tensor]
    held_out: list[Asked]


@dataclass
class Record:
    """A run so far; ``digest`` is that of its file of weights."""

    variant: str
    seed: int
    digest: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    @property
    def weights(self) -> str:
        """The file of weights and, until the run is over, of the optimizer's state; there is one after a step."""
        return f"{self.name}-{len(self.steps)}.safetensors"


def read_record(file: Path) -> Record:
    """
    Raises:
        OSError, ValueError: no such file, or a damaged one; the message names file and field.
    """
    given = read_json(file, MAX_RECORD)
    with naming(file):
        return Record(**RECORD(Field(given)))


def advantages(rewards: Tensor) -> Tensor:
    """How much better every sample is than the others of its prompt: rewards [prompts, samples], less their mean and
    over their standard deviation by prompt, and 0 where all are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, correction=0, keepdim=True)
    return torch.where(spread > 1e-6, centred / spread, torch.zeros_like(centred))


def importance(dense: Tensor, rollout: Tensor, cap: float) -> Tensor:
    """Sparse-RL's weights of tokens that a compressed cache drew, for training the policy of the full one.

    A token weighs its ratio of probabilities, full over compressed cache, at most ``cap``. A picture with a token that
    the full cache would hardly have drawn, of a ratio below `LEAST_RATIO`, is rejected: all its tokens weigh nothing.

    Args:
        dense, rollout: float [N, T], log-probabilities under the full cache and under that of the rollout.
    """
    ratio = dense - rollout
    kept = (ratio >= math.log(LEAST_RATIO)).all(1, keepdim=True)
    return ratio.exp().clamp(max=cap) * kept


def log_probabilities(model: Any, prompt: Sequence[int], codes: Tensor, temperature: float) -> Tensor:
    """Of codes [N, T] that followed one prompt, [N, T], in one pass with gradients, without guidance."""
    janus = model.model
    text = janus.language_model.embed_tokens(torch.tensor([list(prompt)] * len(codes)))
    before = janus.generation_aligner(janus.generation_embeddings(codes[:, :-1]))
    states = janus.language_model(inputs_embeds=torch.cat([text, before], 1), use_cache=False).last_hidden_state
    logits = janus.generation_head(states[:, len(prompt) - 1 :]) / temperature
    return logits.log_softmax(-1).gather(2, codes[..., None])[..., 0]


def trained(model: Any, layers: int) -> dict[str, Tensor]:
    """The parameters that learn, by name: those of the last layers, of the last norm and of the image head. The others
    need no gradients from now on.

    Raises:
        ValueError: the model has fewer layers.
    """
    number_ = model.config.text_config.num_hidden_layers
    if not 1 <= layers <= number_:
        raise ValueError(f"layers must be within 1 .. {number_}, the model's, got {layers}")
    learn = ("language_model.norm.", "generation_head.",
             *(f"language_model.layers.{index}." for index in range(number_ - layers, number_)))
    found = {}
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_(name.startswith(learn))
        if parameter.requires_grad:
            found[name] = parameter
    return found


class Stopwatch:
    """Seconds of the parts of a step, on the wall and of the process's CPU time."""

    def __init__(self) -> None:
        self.wall, self.cpu = (dict.fromkeys(PARTS, 0.0) for _ in range(2))

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[part] += time.perf_counter() - wall
        self.cpu[part] += time.process_time() - cpu


class Learner:
    """One run: a variant and a seed, a step at a time.

    Attributes:
        record: of the run so far.
    """

    def __init__(self, task: Task, options: Options, variant: str, seed: int, initial: Mapping[str, Tensor],
                 folder: Path) -> None:
        """Take up the run that ``folder`` holds, or begin one.

        Args:
            initial: weights by name, where a run begins.
            folder: of its files, which must exist.

        Raises:
            OSError, ValueError: a file is damaged; the message names it.
        """
        self.task, self.options, self.folder = task, options, folder
        self.record = Record(variant, seed)
        file = folder / f"{self.record.name}.json"
        if file.exists():
            self.record = read_record(file)
            if (self.record.variant, self.record.seed) != (variant, seed):
                raise ValueError(f"{file} must be the record of {variant}-{seed}, got that of {self.record.name}")
        self.parameters = trained(task.model, options.layers)
        self.adam = torch.optim.AdamW(self.parameters.values(), options.lr, betas=(0.9, 0.95), weight_decay=0.0)
        values = initial
        if self.record.steps:
            values = self._restored(folder / self.record.weights)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
        self.full, self.compressed = Engine(task.model), Engine(task.model, task.plan)
        self.sampling = Sampling.make(options.temperature)

    @property
    def done(self) -> bool:
        return len(self.record.steps) >= self.options.steps

    def measure(self) -> dict[str, Any]:
        """Of a picture of every held-out prompt, drawn with either cache from the same noise: mean reward, and the
        share of those with the reward 1."""
        prompts, wanted = zip(*self.task.held_out, strict=True)
        found = {"step": len(self.record.steps)}
        for name, engine in (("full", self.full), ("compressed", self.compressed)):
            drawn = engine.rollout(prompts, 1, HELD_OUT_SEED, guidance=GUIDANCE, sampling=self.sampling, logprobs=False)
            rewards = self.task.reward(drawn.tokens, wanted)
            found[name], found[f"{name}_right"] = float(rewards.mean()), float((rewards == 1).float().mean())
        return found

    def step(self) -> None:
        """Draw, judge, learn, and measure if it is time to; what the folder holds is then this step's."""
        options, record, number_ = self.options, self.record, len(self.record.steps)
        if not record.held_out:
            record.held_out.append(self.measure())
        watch, samples = Stopwatch(), options.samples
        asked = self.task.draw(record.seed, number_, options.prompts)
        engine = self.full if record.variant == "full" else self.compressed
        with watch("rollout"):
            first = (record.seed * options.steps + number_) * options.prompts * samples
            drawn = engine.rollout([prompt for prompt, _ in asked], samples, first, guidance=GUIDANCE,
                                   sampling=self.sampling)
        with watch("reward"):
            rewards = self.task.reward(drawn.tokens, [wanted for _, wanted in asked for _ in range(samples)])
        with watch("training"):
            assert drawn.drawn is not None
            better = advantages(rewards.view(-1, samples)).flatten()
            ratios = self._learn([prompt for prompt, _ in asked], drawn.tokens, drawn.drawn, better)
        far = (ratios.abs() > math.log(FAR)).float()
        some = len(ratios) > 0
        record.steps.append({
            "step": number_ + 1, "reward": float(rewards.mean()), "kl": -float(ratios.mean()) if some else None,
            "far": float(far.mean()) if some else None, "trained": len(ratios), "cache_bytes": drawn.cache_bytes,
            "rejected": int((ratios < math.log(LEAST_RATIO)).any(1).sum()), "seconds": watch.wall,
            "cpu_seconds": watch.cpu})
        if self.done or len(record.steps) % options.measure_every == 0:
            record.held_out.append(self.measure())
        self._save()

    def _learn(self, prompts: Sequence[Sequence[int]], codes: Tensor, rollout: Tensor, better: Tensor) -> Tensor:
        """One step of Adam on the samples of prompts that tell better from worse; returns their log ratios of
        probabilities [n, T], full cache over that of the rollout."""
        ratios = []
        for first in range(0, len(codes), ROWS):
            rows = torch.arange(first, min(first + ROWS, len(codes)))
            for index in (rows // self.options.samples).unique().tolist():
                chosen = rows[(rows // self.options.samples == index) & (better[rows] != 0)]
                if len(chosen):
                    dense = log_probabilities(self.task.model, prompts[index], codes[chosen], self.options.temperature)
                    ratios.append(dense.detach() - rollout[chosen])
                    weights = torch.ones_like(dense)
                    if self.record.variant == "corrected":
                        weights = importance(dense.detach(), rollout[chosen], self.options.cap)
                    gain = (weights * better[chosen, None] * dense).mean(1).sum() / len(codes)
                    (-gain).backward()  # type: ignore[no-untyped-call]
        if not ratios:
            return codes.new_empty(0, codes.shape[1], dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        return torch.cat(ratios)

    def _save(self) -> None:
        """Weights first, under a name of their own, then the record that names them."""
        tensors = {f"weights.{name}": value.detach() for name, value in self.parameters.items()}
        if not self.done:
            for name, parameter in self.parameters.items():
                tensors |= {f"{key}.{name}": value for key, value in self.adam.state[parameter].items()}
        file = self.folder / self.record.weights
        data = save({name: value.contiguous() for name, value in tensors.items()})
        write_atomically(file, lambda out: out.write(data))
        self.record.digest = runs.digest(file)
        runs.write_json(self.folder / f"{self.record.name}.json", asdict(self.record))
        for old in self.folder.glob(f"{self.record.name}-*.safetensors"):
            if old != file:
                old.unlink()

    def _restored(self, file: Path) -> dict[str, Tensor]:
        """The weights of a file; the optimizer's state is taken from it, too."""
        if runs.digest(file) != self.record.digest:
            raise ValueError(f"{file} is damaged: it is not what was written; remove {self.record.name}.json to start "
                             "anew")
        tensors = runs.weights(file)
        for name, parameter in self.parameters.items():
            self.adam.state[parameter] = {key.removesuffix(f".{name}"): value for key, value in tensors.items()
                                          if key in (f"step.{name}", f"exp_avg.{name}", f"exp_avg_sq.{name}")}
        return {name: tensors[f"weights.{name}"] for name in self.parameters}
