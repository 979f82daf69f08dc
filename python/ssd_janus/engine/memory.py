"""What drawing takes: weights, cache and the decoding into pixels; and how many pictures fit."""

from __future__ import annotations

import functools
import json
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import JanusVQVAE, JanusVQVAEConfig

from ssd_kernels import CachePlan
from ssd_kernels.process import control_groups

from ..quantization import stored_bytes
from ..shape import ModelShape, placement
from .layers import PREFILL_CHUNK, PREFILL_TOKENS, ROW_MULTIPLE, prefill_width
from .weights import TABLE_CODES

USABLE_SHARE = 0.9  # of what is free: allocators round up, and convolutions need room of their own


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one run. The caches are freed before pictures are decoded, so the parts do not all add up.

    Attributes:
        weights: all parameters and buffers that are loaded.
        cache: slabs, scores, positions and tables of the largest batch.
        step: buffers of a step of that batch, an upper estimate.
        decode: most that decoding one chunk of pictures takes beside the weights (`decode_bytes`).
        device_peak: what torch's allocator measured over the token loop and the decoding; None on a CPU.
    """

    weights: int
    cache: int
    step: int
    decode: int
    device_peak: int | None = None

    @property
    def peak(self) -> int:
        """The larger of the two phases, weights included."""
        return self.weights + max(self.cache + self.step, self.decode)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers that are in memory; shared ones count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(stored_bytes(tensor) for tensor in tensors.values() if tensor.device.type != "meta")


def step_bytes(model: Any, pictures: int, rows: int, max_prompt: int, different: int | None = None) -> int:
    """What a batch needs beside weights and cache, at most: sampling with every filter.

    That is the rotary table and the table of next inputs, and the largest of three moments: the table is made, the
    prompts are in a layer, a token is chosen from logits. Temporary memory of libraries is not in it.

    Args:
        pictures, rows: of the batch.
        max_prompt: longest prompt, tokens.
        different: prompts that differ among those of the rows, of which each is run once; None: all do.
    """
    different = rows if different is None else different
    shape, config = ModelShape.of(model), model.model.language_model.config
    size = placement(model)[1].itemsize
    codes = model.model.generation_head.vision_head.out_features
    widths = (shape.num_query_heads + 2 * shape.num_heads) * shape.head_dim
    rotary = 2 * 4 * (max_prompt + shape.num_visual_tokens) * shape.head_dim
    table = size * codes * config.hidden_size if codes <= TABLE_CODES else 0
    if placement(model)[0].type == "cuda":
        width = prefill_width(max_prompt, PREFILL_CHUNK)
        tokens = max(PREFILL_CHUNK, width, rows)
    else:
        width = max_prompt
        tokens = max(min(different * max_prompt, max(PREFILL_TOKENS, max_prompt)), rows) + ROW_MULTIPLE
    # Keys and values: as projected, rotated, and once more for every row of the cache.
    copies = 2 * rows * width * shape.num_heads * shape.head_dim
    layer = tokens * (3 * config.hidden_size + 3 * widths + 4 * config.intermediate_size) + copies
    buffers = (rows + ROW_MULTIPLE) * (2 * config.hidden_size + shape.num_query_heads * shape.head_dim)
    # Logits in both dtypes; noise, guided logits and what filters make of them, with 8-byte numbers of codes.
    logits = rows * codes * (size + 4) + pictures * codes * (4 * 8 + 2 * 8)
    # While the table is made, the aligner holds as much again.
    return rotary + table + size * buffers + max(table, size * layer, logits) + 4 * pictures * codes


def shared_prompts(plan: CachePlan, rows: int, different: int) -> int | None:
    """How a batch holds its prompts: as many as differ, once each, or None, where every row holds its own.

    Args:
        rows: of the batch. different: prompts among theirs.
    """
    return different if plan.keep_prompt and different < rows else None


def max_batch(plan: CachePlan, model: Any, memory: int, *, guided: bool = True, max_prompt: int = 64,
              different: Callable[[int], int] | None = None) -> int:
    """Most pictures that can be drawn at once.

    Args:
        plan: what the caches keep.
        model: transformers' Janus.
        memory: bytes for everything, the weights included.
        guided: two rows per picture instead of one.
        max_prompt: longest prompt, tokens.
        different: prompts that differ among the rows of so many pictures at once; None: those of all rows do.

    Returns:
        0 when not even one picture fits, be it its cache or its decoding.
    """
    shape = ModelShape.of(model)
    sizes = {"head_dim": shape.head_dim, "max_prompt": max_prompt, "dtype": placement(model)[1],
             "num_visual_tokens": shape.num_visual_tokens}
    cache_bytes = _cache_bytes(plan, sizes)
    free = memory - weight_bytes(model)
    if decode_bytes(model, 1) > free:
        return 0

    def fits(pictures: int) -> bool:
        rows = pictures * (1 + guided)
        count = rows if different is None else different(pictures)
        shared = shared_prompts(plan, rows, count)
        return cache_bytes(rows, shared) + step_bytes(model, pictures, rows, max_prompt, count) <= free

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _cache_bytes(plan: CachePlan, sizes: dict[str, Any]) -> Callable[[int, int | None], int]:
    """`CachePlan.nbytes` by rows and shared prompts, in which it is linear: a few sizes give all."""
    one, two = (plan.nbytes(batch_size=rows, **sizes) for rows in (1, 2))
    first, second, third = (plan.nbytes(batch_size=rows, shared_prompts=prompts, **sizes) if plan.keep_prompt else 0
                            for rows, prompts in ((1, 1), (2, 1), (1, 2)))

    def nbytes(rows: int, prompts: int | None) -> int:
        if prompts is None:
            return one + (rows - 1) * (two - one)
        return first + (rows - 1) * (second - first) + (prompts - 1) * (third - first)

    return nbytes


def decode_bytes(model: Any, pictures: int) -> int:
    """Most bytes of tensors alive while ``pictures`` are decoded into pixels, without the weights.

    The decoder runs on tensors without contents, which count what a real run would hold. What libraries take inside a
    convolution is not in it.
    """
    dtype = next(model.model.vqmodel.parameters()).dtype
    return pictures * _decode_bytes_of_one(model.config.vq_config.to_json_string(use_diff=False), dtype)


@functools.lru_cache(maxsize=8)
def _decode_bytes_of_one(config: str, dtype: torch.dtype) -> int:
    settings = JanusVQVAEConfig(**json.loads(config))
    with torch.device("meta"), torch.no_grad():
        vq = JanusVQVAE(settings).to(dtype).eval()
        codes = torch.zeros(1, settings.num_patches ** 2, dtype=torch.long)
        return _peak_bytes(lambda: vq.decode(codes))


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, as far as the system says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return host_memory()[1]


def total_memory() -> int:
    """Bytes of the host's memory, or of what this process may use of it."""
    return host_memory()[0]


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes that this process may use in all, and bytes that are still free: the least that Linux reports for the
    machine, for the process's control group and for every group around it. A large number on another system.

    Page cache that a group has not used lately counts as free, as it does for the machine: Linux drops it first.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    machine = {name: size * 1024 for name, size in _numbers(root / "proc/meminfo").items()}
    limits, rooms = [machine.get("MemTotal:", 2**62)], [machine.get("MemAvailable:", 2**62)]
    for folder, limit_file, used_file, cache in _control_groups(root):
        limit, used = (_numbers(folder / name).get("") for name in (limit_file, used_file))
        if limit is not None:
            limits.append(limit)
            rooms.append(limit - (used or 0) + _numbers(folder / "memory.stat").get(cache, 0))
    return min(limits), max(0, min(rooms))


def _control_groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Of this process, innermost first: folder, files of limit and use, and the name of idle page cache in
    ``memory.stat``. Some folders do not exist."""
    for version, folder in control_groups("memory", root):
        if version == 2:
            yield folder, "memory.max", "memory.current", "inactive_file"
        else:
            yield folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def _numbers(file: Path) -> dict[str, int]:
    """Numbers at the start of the lines of a file by the word before them, "" where there is none; empty when there is
    no such file."""
    try:
        return {name: int(number) for name, number in re.findall(r"^(?:(\S+)[ \t]+)?(\d+)", file.read_text(), re.M)}
    except OSError:
        return {}


class _Tracker(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off when they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs))
                  if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def _peak_bytes(function: Callable[[], Any]) -> int:
    with _Tracker() as tracker:
        result = function()
    del result
    return tracker.peak
