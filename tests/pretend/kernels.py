"""In the place of the GPU backends' kernels: the CPU's, launched by the backends' own host code.

They reach the memory by addresses, as kernels do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ssd_kernels import filters, native, noise, philox, sampling
from ssd_kernels.backends.cpu import DTYPE_CODES
from ssd_kernels.backends.cuda import CUDABackend
from ssd_kernels.backends.triton import TritonBackend

from .machine import Machine, machine
from .tensor import Pretended, touched

ITEM_SIZES = (4, 2, 2)  # by the codes of storage types
TENSORS = ("keys", "values", "scores", "positions", "cursors", "table", "pinned")
SCALES = ("key_scales", "value_scales", "prompt_key_scales", "prompt_value_scales")


class Layer:
    """A layer's cache by the addresses and numbers that `ssd_kernels._C.Layer` is made from."""

    def __init__(self, *arguments: int) -> None:
        self.arguments = arguments
        names = ("dtype", "batch", "heads", "head_dim", "slots", "scored_slots", "max_prompt", "num_visual_tokens",
                 "row_buffer", "keep_prompt", "prompt_keys", "prompt_values", "prompt_of", "shared_prompts",
                 "prompt_scores", *SCALES)
        self.addresses = dict(zip(TENSORS, arguments, strict=False))
        self.sizes = SimpleNamespace(**dict(zip(names, arguments[len(TENSORS):], strict=True)))

    def _unfinished(self) -> list[int]:
        """Rows that have a step left, which are all that a kernel changes."""
        cursors = (ctypes.c_int32 * (2 * self.sizes.batch)).from_address(self.addresses["cursors"])
        return [row for row in range(self.sizes.batch) if cursors[2 * row + 1] < self.sizes.num_visual_tokens]

    def _row(self, row: int) -> Any:
        sizes, at = self.sizes, self.addresses
        item = 1 if sizes.key_scales else ITEM_SIZES[sizes.dtype]
        slab, scored = row * sizes.slots * sizes.head_dim * item, row * sizes.scored_slots * 4
        moved = (at["keys"] + slab, at["values"] + slab, at["scores"] + scored, at["positions"] + scored,
                 at["cursors"] + 8 * row, at["table"], at["pinned"])
        rest = {**vars(sizes), "batch": 1, "prompt_of": sizes.prompt_of and sizes.prompt_of + 4 * row,
                **{name: getattr(sizes, name) and getattr(sizes, name) + 4 * row * sizes.slots for name in SCALES[:2]}}
        return native.extension().Layer(*moved, *rest.values())

    def step(self, q: int, k: int, v: int, out: int, query_heads: int, strides: Sequence[int], scale: float, cos: int,
             sin: int) -> None:
        """As `ssd_kernels._C.Layer.decode`, of the rows that are not finished."""
        rows, threads, size = self._unfinished(), torch.get_num_threads(), ITEM_SIZES[self.sizes.dtype]
        if len(rows) == self.sizes.batch:
            native.extension().Layer(*self.arguments).decode(q, k, v, out, query_heads, *strides, scale, cos, sin,
                                                             threads)
            return
        for row in rows:
            at = [address + row * stride * size for address, stride in
                  zip((q, k, v, out), (*strides[::2], query_heads * self.sizes.head_dim), strict=True)]
            self._row(row).decode(*at, query_heads, *strides, scale, cos, sin, threads)

    def start(self, k: int, v: int, scores: int, prompt_stride: int, count: int, lengths: int, rows: int) -> None:
        """As `ssd_kernels._C.Layer.prefill`, with lengths and rows in memory."""
        numbers = [list((ctypes.c_int32 * count).from_address(address)) for address in (lengths, rows)]
        native.extension().Layer(*self.arguments).prefill(k, v, scores, prompt_stride, *numbers,
                                                          torch.get_num_threads())


class CUDALayer(Layer):
    """In the place of `ssd_kernels._C.CUDALayer`."""

    def decode(self, q: int, k: int, v: int, out: int, query_heads: int, *others: Any) -> None:
        strides, (scale, cos, sin), (device, number) = others[:6], others[6:9], others[-2:]
        self._launch("decode (cuda)", device, number,
                     lambda: self.step(q, k, v, out, query_heads, strides, scale, cos, sin))

    def prefill(self, k: int, v: int, scores: int, prompt_stride: int, count: int, lengths: int, rows: int,
                device: int, number: int) -> None:
        self._launch("prefill (cuda)", device, number,
                     lambda: self.start(k, v, scores, prompt_stride, count, lengths, rows))

    def list_items(self, table: int, alternating: bool, items: int) -> None:
        """Nothing: the CPU's kernels have no blocks that look up what they serve."""

    @staticmethod
    def _launch(name: str, device: int, number: int, operation: Callable[[], None]) -> None:
        stream = machine().stream(device)
        assert stream.cuda_stream == number, f"stream {number} is not the current one of device {device}"
        machine().launch(name, device, operation)


def extension() -> Any:
    """The extension, with kernels for the pretended device."""
    real = native.extension()
    return SimpleNamespace(**{**vars(real), "CUDALayer": CUDALayer, "cuda_unavailable": lambda: None})


class Launcher:
    """Stands for a `triton.JITFunction`: ``launcher[grid](*arguments)`` launches on the current device.

    ``whole``: it reads or writes all of each of its tensors, once. What others move depends on the cursors, and is not
    counted.
    """

    def __init__(self, function: Any, run: Callable[[SimpleNamespace], None], *, whole: bool = False) -> None:
        self.function, self.run, self.whole = function, run, whole

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **named: Any) -> None:
        names = self.function.arg_names
        given = dict(zip(names, arguments, strict=False)) | {name: named[name] for name in named if name in names}
        assert set(given) == set(names), f"{set(names) ^ set(given)} are missing or too many"
        here, device = machine(), machine().current
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        for name, tensor in tensors.items():
            assert isinstance(tensor, Pretended), f"{name} is on the host"
            assert tensor.device.index == device, f"{name} is on {tensor.device}, the launch goes to cuda:{device}"
        # What a graph replays reads the same memory: the addresses and who owns it are kept, not the tensors.
        values = SimpleNamespace(**{**given, **{name: tensor.data_ptr() for name, tensor in tensors.items()}},
                                 held={name: tensor.held for name, tensor in tensors.items()})
        here.launch(f"{self.function.__name__} (triton)", device, lambda: self.run(values),
                    sum(map(touched, values.held.values())) if self.whole else 0, variant=tuple(self._variant(given)))

    def _variant(self, given: dict[str, Any]) -> Iterator[Any]:
        """What Triton compiles a kernel of its own for: constants, and integers that are 1 or divisible by 16."""
        for parameter in self.function.params:
            value = given[parameter.name]
            if parameter.is_constexpr:
                yield parameter.name, value
            elif isinstance(value, int) and not parameter.do_not_specialize:
                yield parameter.name, value == 1, value % 16 == 0


def _layer(given: SimpleNamespace, step: str, batch: int, row_buffer: int, *shared: int) -> Layer:
    """``step``: a tensor in the dtype of the step. ``shared``: as `ssd_kernels._C.Layer` has them."""
    scales = [getattr(given, name, 0) if given.INT8 else 0 for name in SCALES]
    if not shared or not shared[0]:
        scales[2:] = [0, 0]
    return Layer(*(getattr(given, name) for name in TENSORS), DTYPE_CODES[given.held[step].dtype], batch, given.heads,
                 given.D, given.slots, given.scored_slots, given.max_prompt, given.num_visual_tokens, row_buffer,
                 given.KEEP_PROMPT, *(shared or (0, 0, 0, 0, True)), *scales)


def _decode(given: SimpleNamespace) -> None:
    assert isinstance(given.scale, float), f"a scale of {type(given.scale).__name__} compiles another kernel"
    strides = [getattr(given, f"{name}_{of}") for name in "qkv" for of in ("row", "head")]
    tables = (given.cos, given.sin) if given.ROTARY else (0, 0)
    prompts = (given.prompt_keys, given.prompt_values, given.prompt_of) if given.SHARED else (0, 0, 0)
    layer = _layer(given, "q", given.batch, given.period, *prompts, given.shared_prompts, given.PROMPT_SCORES)
    layer.step(given.q, given.k, given.v, given.out, given.heads * given.GROUP, strides, given.scale, *tables)


def _prefill(given: SimpleNamespace) -> None:
    batch, count = given.held["keys"].shape[0], len(given.held["rows"])
    # Which steps evict is nothing to a prefill.
    _layer(given, "k", batch, 0).start(given.k, given.v, given.given if given.GIVEN else 0, given.prompt_stride, count,
                                       given.prompt_lens, given.rows)


def _noise(given: SimpleNamespace) -> None:
    out, seeds, steps = (given.held[name] for name in ("out", "seeds", "steps"))
    out.copy_(philox.exponential(seeds, steps, given.codes))


def _sample(given: SimpleNamespace) -> None:
    held = given.held
    numbers = {"each": filters.PerPicture(held["temperature"], held["top_k"], held["share"])} if given.EACH else {
        "temperature": given.temperature, "top_k": given.top_k, "top_p": 1 - given.share / 2**30}
    chosen = filters.sample(held["row_logits"], held["scale"], held["seeds"], held["steps"], **numbers)
    held["tokens"].copy_(chosen)


def patches(here: Machine) -> list[tuple[Any, str, Any]]:
    """Owner, name and replacement of what the backends ask about the machine and what they launch."""
    import ssd_kernels.arguments
    import ssd_kernels.cache
    import ssd_kernels.ops
    from ssd_kernels.backends import triton as triton_backend

    plain = ssd_kernels.arguments.plain
    kernels = triton_backend._kernels

    def plain_or_pretended(name: str, tensor: object) -> torch.Tensor:
        if not isinstance(tensor, Pretended):
            return plain(name, tensor)
        stands_for = plain(name, tensor.held)
        return tensor if stands_for is tensor.held else Pretended(stands_for, tensor.device.index)

    def launchers(self: Any) -> SimpleNamespace:
        real = kernels()
        return SimpleNamespace(decode_kernel=Launcher(real.decode_kernel, _decode),
                               prefill_kernel=Launcher(real.prefill_kernel, _prefill))

    noise_kernel, sample_kernel = noise._kernel, sampling._kernel
    cuda_unavailable = CUDABackend.unavailable

    def unavailable(self: CUDABackend) -> str | None:
        if type(self) is not CUDABackend:
            return cuda_unavailable(self)
        missing = native.missing()
        built = missing is None and hasattr(native.extension(), "CUDALayer")
        return missing or (None if built else "the extension was built without CUDA")

    def own_extension(self: CUDABackend) -> Any:
        return extension()

    return [*((module, "plain", plain_or_pretended) for module in
              (ssd_kernels.arguments, ssd_kernels.cache, ssd_kernels.ops)),
            (TritonBackend, "kernels", launchers),
            (TritonBackend, "capability", lambda self, device: 10 * here.capability[0] + here.capability[1]),
            (noise, "_kernel", lambda: Launcher(noise_kernel(), _noise, whole=True)),
            (sampling, "_kernel", lambda: Launcher(sample_kernel(), _sample, whole=True)),
            (CUDABackend, "unavailable", unavailable), (CUDABackend, "extension", own_extension)]


