"""``torch.ops.ssd_kernels.decode`` and ``.prefill``: the operators as torch.compile and CUDA graphs see them.

Registered with `torch.library.Library`, with fakes and mutation annotations. Eager calls through
`CompressedCache` skip the dispatcher and call the backend directly; the computation is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import backends
from .arguments import check_memory, integers, plain
from .layout import LayerLayout
from .state import LayerState, Rotary

_CACHE = ("Tensor(a!) keys, Tensor(b!) values, Tensor(c!) scores, Tensor(d!) positions, Tensor(e!) cursors, "
          "Tensor table, Tensor pinned, int max_prompt, int num_visual_tokens, int row_buffer, bool keep_prompt, "
          "int largest, int longest")

_SCALES = "Tensor(f!)? key_scales=None, Tensor(g!)? value_scales=None"

SCALES = ("key_scales", "value_scales", "prompt_key_scales", "prompt_value_scales")

_library = torch.library.Library("ssd_kernels", "DEF")
_library.define(f"decode(Tensor q, Tensor k, Tensor v, {_CACHE}, float scale, str backend, "
                "Tensor? cos=None, Tensor? sin=None, Tensor? prompt_keys=None, Tensor? prompt_values=None, "
                f"Tensor? prompt_of=None, bool prompt_scores=True, {_SCALES}, Tensor? prompt_key_scales=None, "
                "Tensor? prompt_value_scales=None) -> Tensor",
                tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"prefill(Tensor k, Tensor v, Tensor prompt_lens, Tensor? prompt_scores, Tensor rows, {_CACHE}, "
                f"str backend, {_SCALES}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def layout_arguments(layout: LayerLayout) -> tuple[int, int, int, bool, int, int]:
    """The layout's scalars in the order of the operators' schema."""
    return (layout.max_prompt, layout.num_visual_tokens, layout.row_buffer, layout.keep_prompt, layout.largest,
            layout.longest)


def shared_arguments(state: LayerState) -> tuple[torch.Tensor | bool, ...]:
    """`decode`'s arguments from ``prompt_keys`` on: of a layer whose rows share prompts, else nothing."""
    return (*state.shared, state.layout.prompt_scores) if state.shared else ()


def scale_arguments(state: LayerState) -> dict[str, torch.Tensor]:
    """`decode`'s last arguments, and `prefill`'s where rows share no prompts: of a layer in 8 bits, else nothing."""
    return dict(zip(SCALES, state.scales, strict=False))


def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
           scores: torch.Tensor, positions: torch.Tensor, cursors: torch.Tensor, table: torch.Tensor,
           pinned: torch.Tensor, max_prompt: int, num_visual_tokens: int, row_buffer: int, keep_prompt: bool,
           largest: int, longest: int, scale: float, backend: str, cos: torch.Tensor | None = None,
           sin: torch.Tensor | None = None, prompt_keys: torch.Tensor | None = None,
           prompt_values: torch.Tensor | None = None, prompt_of: torch.Tensor | None = None,
           prompt_scores: bool = True, key_scales: torch.Tensor | None = None,
           value_scales: torch.Tensor | None = None, prompt_key_scales: torch.Tensor | None = None,
           prompt_value_scales: torch.Tensor | None = None) -> torch.Tensor:
    """One decode step of one layer (docs/specification.md, section 3): append, attend, score, evict.

    Args:
        q: ``[B, Hq, D]`` queries; k, v: ``[B, H, D]`` key and value of the new token; rotated, or to be rotated by
            cos and sin.
        keys, values: slabs ``[B, S, D]`` in q's dtype, or int8 with scales, changed in place.
        scores (float32), positions (int32): ``[B, T]``, changed in place.
        cursors: int32 ``[B, 2]``, changed in place.
        table: int32 ``[H, 8]``; with the six numbers after ``pinned``, the layout
            (`ssd_kernels.layout.LayerLayout`).
        pinned: int32 ``[H, W]``, a bit per visual token (`ssd_kernels.layout.LayerLayout.pin_mask`).
        scale: factor on the dot products.
        backend: a backend's name, not ``"auto"``.
        cos, sin: float32 ``[N, D / 2]`` to rotate q and k by (`ssd_kernels.reference.rotate`), or neither.
        prompt_keys, prompt_values: slabs ``[N, H * max_prompt, D]`` of prompts that rows share, or neither.
        prompt_of: int32 ``[B]``, which of them a row reads.
        prompt_scores: whether these prompts' tokens have scores.
        key_scales, value_scales: float32 ``[B, S]``, changed in place, of slabs in 8 bits
            (docs/specification.md, section 3.13), or neither.
        prompt_key_scales, prompt_value_scales: float32 ``[N, H * max_prompt]``, those of shared prompts.

    Returns:
        ``[B, Hq, D]`` in q's dtype, contiguous.

    Raises:
        TypeError: a tensor is not plain (`ssd_kernels.arguments.plain`).
        ValueError: shapes or the table do not fit together, the backend cannot serve them, or a row has no step left.
    """
    q, k, v = plain("q", q), plain("k", k), plain("v", v)
    check_memory("keys", keys)  # before others are compared with its shape, which some tensors cannot tell
    shared = _shared(prompt_keys, prompt_values, prompt_of, keys, table, max_prompt)
    scales = _scales(key_scales, value_scales, keys, keys.shape[:2])
    if shared:
        scales += _scales(prompt_key_scales, prompt_value_scales, keys, shared[0].shape[:2], "prompt_")
    state = _state(q.dtype if scales else keys.dtype, keys, values, scores, positions, cursors, table, pinned,
                   max_prompt, num_visual_tokens, row_buffer, keep_prompt, largest, longest, backend, shared,
                   prompt_scores, scales)
    _check_step(state, q, k, v)
    rotary = None
    if cos is not None or sin is not None:
        rotary = checked_rotary((cos, sin), max_prompt + num_visual_tokens, q)
    return backends.get(backend).decode(state, q, k, v, scale, rotary)


def prefill(k: torch.Tensor, v: torch.Tensor, prompt_lens: torch.Tensor, prompt_scores: torch.Tensor | None,
            rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor,
            positions: torch.Tensor, cursors: torch.Tensor, table: torch.Tensor, pinned: torch.Tensor,
            max_prompt: int, num_visual_tokens: int, row_buffer: int, keep_prompt: bool, largest: int, longest: int,
            backend: str, key_scales: torch.Tensor | None = None, value_scales: torch.Tensor | None = None) -> None:
    """Restart ``rows`` of one layer with new prompts (docs/specification.md, section 3.5).

    Rows that share prompts are restarted by `CompressedCache.prefill`, which knows on the host who reads which.

    Args:
        k, v: ``[N, H, P, D]``; entry i is valid in ``[0, prompt_lens[i])``.
        prompt_lens, rows: ``[N]`` of an integer dtype, on the CPU.
        prompt_scores: float32 ``[N, H, P]`` or None.
        keys .. keep_prompt, backend, key_scales, value_scales: as in `decode`.

    Raises:
        TypeError, ValueError: shapes, lengths or rows out of range, or the backend cannot serve them.
    """
    k, v = plain("k", k), plain("v", v)
    check_memory("keys", keys)
    scales = _scales(key_scales, value_scales, keys, keys.shape[:2])
    dtype = k.dtype if scales else keys.dtype
    state = _state(dtype, keys, values, scores, positions, cursors, table, pinned, max_prompt, num_visual_tokens,
                   row_buffer, keep_prompt, largest, longest, backend, scales=scales)
    lengths, indices = integers("prompt_lens", prompt_lens), integers("rows", rows)
    prompt_scores = None if prompt_scores is None else plain("prompt_scores", prompt_scores)
    expected = (len(indices), table.shape[0], k.shape[2] if k.dim() == 4 else 0, keys.shape[2])
    if k.shape != expected or v.shape != expected or len(lengths) != len(indices):
        raise ValueError(f"k and v must be [N, H, P, D] = {list(expected)} with N prompt_lens, got "
                         f"{list(k.shape)}, {list(v.shape)} and {len(lengths)}")
    for name, tensor, wanted in (("k", k, dtype), ("v", v, dtype), ("prompt_scores", prompt_scores, torch.float32)):
        if tensor is not None and (tensor.dtype != wanted or tensor.device != keys.device):
            raise ValueError(f"{name} must be {wanted} on {keys.device}, got {tensor.dtype} on {tensor.device}")
    if prompt_scores is not None and prompt_scores.shape != expected[:3]:
        raise ValueError(f"prompt_scores must be {list(expected[:3])}, got {list(prompt_scores.shape)}")
    if any(not 0 <= n <= min(max_prompt, expected[2]) for n in lengths):
        raise ValueError(f"prompt_lens must be within 0 .. {min(max_prompt, expected[2])}, got {lengths}")
    if any(not 0 <= row < keys.shape[0] for row in indices) or len(set(indices)) != len(indices):
        raise ValueError(f"rows must be distinct and within 0 .. {keys.shape[0] - 1}, got {indices}")
    backends.get(backend).prefill(state, k, v, lengths, prompt_scores, indices)


def _state(dtype: torch.dtype, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, positions: torch.Tensor,
           cursors: torch.Tensor, table: torch.Tensor, pinned: torch.Tensor, max_prompt: int,
           num_visual_tokens: int, row_buffer: int, keep_prompt: bool, largest: int, longest: int,
           backend: str, shared: tuple[torch.Tensor, ...] = (), prompt_scores: bool = True,
           scales: tuple[torch.Tensor, ...] = ()) -> LayerState:
    """The layer of the operators' tensors; that ``keys`` is plain has been checked."""
    for name, tensor in (("values", values), ("scores", scores), ("positions", positions), ("cursors", cursors),
                         ("table", table), ("pinned", pinned)):
        check_memory(name, tensor)
    for name, tensor, dims in (("keys", keys, 3), ("scores", scores, 2)):
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got {list(tensor.shape)}")
    kv_format = "int8" if scales else "auto"
    layout = LayerLayout.from_table(table, keys.shape[1], scores.shape[1], max_prompt, num_visual_tokens, row_buffer,
                                    keep_prompt, largest, longest, len(shared[0]) if shared else 0, prompt_scores,
                                    kv_format, read=table.is_cpu or backends.get(backend).reads_table)
    if table.device != keys.device:
        raise ValueError(f"table must be on {keys.device}, got {table.device}")
    batch, stored = keys.shape[0], torch.int8 if scales else dtype
    for name, tensor, shape, wanted in (("keys", keys, (batch, layout.slots, keys.shape[-1]), stored),
                                       ("values", values, keys.shape, stored),
                                       ("scores", scores, (batch, layout.scored_slots), torch.float32),
                                       ("positions", positions, (batch, layout.scored_slots), torch.int32),
                                       ("cursors", cursors, (batch, 2), torch.int32),
                                       ("pinned", pinned, (table.shape[0], layout.pin_words), torch.int32)):
        _check_storage(name, tensor, shape, wanted, keys.device)
    if reason := backends.get(backend).unsupported(keys.device, dtype, keys.shape[2], kv_format):
        raise ValueError(f"backend={backend!r} cannot be used: {reason}")
    return LayerState(layout, dtype, keys, values, scores, positions, cursors, table, pinned,
                      *(shared or (None, None, None)), *scales)


def _shared(prompt_keys: torch.Tensor | None, prompt_values: torch.Tensor | None, prompt_of: torch.Tensor | None,
            keys: torch.Tensor, table: torch.Tensor, max_prompt: int) -> tuple[torch.Tensor, ...]:
    """The tensors of shared prompts, all or none."""
    given = {"prompt_keys": prompt_keys, "prompt_values": prompt_values, "prompt_of": prompt_of}
    if all(tensor is None for tensor in given.values()):
        return ()
    tensors = []
    count = "N" if prompt_keys is None or prompt_keys.dim() != 3 or len(prompt_keys) == 0 else len(prompt_keys)
    slab: list[int | str] = [count, table.shape[0] * max_prompt, keys.shape[-1]]
    shapes: list[Sequence[int | str]] = [slab, slab, [len(keys)]]
    for (name, tensor), shape, dtype in zip(given.items(), shapes, (keys.dtype, keys.dtype, torch.int32), strict=True):
        if tensor is None:
            raise ValueError(f"{name} must be given where rows share prompts, got None")
        check_memory(name, tensor)
        _check_storage(name, tensor, shape, dtype, keys.device)
        tensors.append(tensor)
    return tuple(tensors)


def _scales(of_keys: torch.Tensor | None, of_values: torch.Tensor | None, keys: torch.Tensor, slots: Sequence[int],
            prefix: str = "") -> tuple[torch.Tensor, ...]:
    """The scales of 8-bit slabs with such ``slots``, both or none."""
    tensors = []
    for name, tensor in ((f"{prefix}key_scales", of_keys), (f"{prefix}value_scales", of_values)):
        if (tensor is None) is (keys.dtype == torch.int8):
            raise ValueError(f"{name} must be {'given' if tensor is None else 'None'} with keys of {keys.dtype}, got "
                             f"{'None' if tensor is None else list(tensor.shape)}")
        if tensor is not None:
            check_memory(name, tensor)
            _check_storage(name, tensor, slots, torch.float32, keys.device)
            tensors.append(tensor)
    return tuple(tensors)


def _check_storage(name: str, tensor: torch.Tensor, shape: Sequence[int | str], dtype: torch.dtype,
                   device: torch.device) -> None:
    if (list(tensor.shape) != list(shape) or tensor.dtype != dtype or tensor.device != device
            or not tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous {list(shape)} of {dtype} on {device}, got {list(tensor.shape)} of "
                         f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}")


def _check_step(state: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    batch, _, head_dim = state.keys.shape
    heads = state.table.shape[0]
    if q.dim() != 3 or q.shape[0] != batch or q.shape[2] != head_dim or q.shape[1] % heads or q.shape[1] == 0:
        raise ValueError(f"q must be [B, Hq, D] = [{batch}, multiple of {heads}, {head_dim}], got {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != (batch, heads, head_dim):
            raise ValueError(f"{name} must be [B, H, D] = {[batch, heads, head_dim]}, got {list(tensor.shape)}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype != state.dtype or tensor.stride(2) != 1 or tensor.device != state.keys.device:
            raise ValueError(f"{name} must be {state.dtype} on {state.keys.device} with unit last stride, got "
                             f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}")


def checked_rotary(rotary: object, positions: int, q: torch.Tensor, compiling: bool = False) -> Rotary:
    """``rotary`` as kernels read it, when it serves ``positions`` positions of ``q``.

    Args:
        compiling: the tensors are those of torch.compile, which have no memory.

    Raises:
        TypeError, ValueError: it is no such pair of tables.
    """
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise TypeError(f"rotary must be the pair (cos, sin) or None, got {type(rotary).__name__}")
    half, odd = divmod(q.shape[2], 2)
    device, tables = q.device, []
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        if not compiling:
            table = plain(name, table)
        elif not isinstance(table, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(table).__name__}")
        shape = table.shape
        if (len(shape) != 2 or shape[0] < positions or shape[1] != half or odd or table.dtype != torch.float32
                or table.device != device or not table.is_contiguous()):
            raise ValueError(f"{name} must be contiguous float32 [at least {positions}, {half}] on {device}, got "
                             f"{table.dtype} {list(shape)} on {table.device}")
        tables.append(table)
    return tables[0], tables[1]


def _decode_fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _prefill_fake(*_: object) -> None:
    return None


_library.impl("decode", decode, "CompositeExplicitAutograd")
_library.impl("prefill", prefill, "CompositeExplicitAutograd")
torch.library.register_fake("ssd_kernels::decode", _decode_fake, lib=_library)
torch.library.register_fake("ssd_kernels::prefill", _prefill_fake, lib=_library)
