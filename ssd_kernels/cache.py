"""`CompressedCache`: the KV cache of a whole model under a plan."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import torch

from . import backends, ops
from .arguments import SUSPECT, check_int, integers, plain
from .layout import KEEP_ALL, RECENT, LayerLayout, RowView
from .plan import CachePlan
from .reading import shown
from .sharing import PromptShares, checked_share
from .state import LayerState, Rotary, physical_memory
from .steps import StepCounts

__all__ = ["CompressedCache"]

_logger = logging.getLogger("ssd_kernels")
NOTICEABLE_SECONDS = 1.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CompressedCache:
    """Per-head compressed KV cache of B batch rows (docs/specification.md, sections 3 and 4).

    Inference only: results carry no gradient. Steps past the end raise here; inside torch.compile and CUDA graphs
    Python does not count, and the kernels leave a finished row untouched.

    Attributes:
        steps: the rows' steps, counted on the host.
    """

    def __init__(self, plan: CachePlan, batch_size: int, num_query_heads: int, head_dim: int, max_prompt: int,
                 num_visual_tokens: int = 576, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", backend: str = "auto", track_scores: bool = False,
                 shared_prompts: int | None = None) -> None:
        """
        Args:
            plan: what every head keeps; ``plan.num_heads`` is the number of KV heads H.
            batch_size: B, rows; a picture with CFG takes two.
            num_query_heads: Hq, a multiple of H (grouped-query attention).
            head_dim: D.
            max_prompt: longest prompt of any row, in tokens.
            num_visual_tokens: decode steps of a whole picture.
            dtype: of q, k, v, output, and of slabs unless the plan's ``kv_format`` says otherwise: float32, bfloat16,
                float16 (float64 on the reference backend).
            device: where the cache lives.
            backend: ``"auto"`` or one of `ssd_kernels.info()`'s backends.
            track_scores: keep scores of every head, not only of heavy ones, and of shared prompts too.
            shared_prompts: most different prompts at once, which are kept once each for all the rows that start with
                them (docs/specification.md, section 3.12); only with the plan's ``keep_prompt``. None gives every row
                room for a prompt of its own.

        Raises:
            TypeError, ValueError: an argument out of range, or a backend that cannot serve the request.
            MemoryError: it does not fit; the message says how many bytes it takes and what to lower.
        """
        if not isinstance(plan, CachePlan):
            raise TypeError(f"plan must be a CachePlan, got {type(plan).__name__}")
        for name, value in (("batch_size", batch_size), ("head_dim", head_dim)):
            if check_int(name, value, 1) > KEEP_ALL:
                raise ValueError(f"{name} must be at most {KEEP_ALL}, got {shown(value)}")
        check_int("num_query_heads", num_query_heads, 1)
        if num_query_heads % plan.num_heads:
            raise ValueError(f"num_query_heads must be a multiple of the plan's {plan.num_heads} KV heads, got "
                             f"{num_query_heads}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self.plan = plan
        self.batch_size = batch_size
        self.num_query_heads = num_query_heads
        self.head_dim = head_dim
        self.max_prompt = max_prompt
        self.num_visual_tokens = num_visual_tokens
        self.shared_prompts = shared_prompts
        self.dtype = dtype
        try:
            self.device = torch.empty(0, device=device).device
        except (AssertionError, RuntimeError) as error:  # torch's words for unknown and absent devices
            raise ValueError(f"device {device!r} cannot be used: {error}") from error
        layouts = [LayerLayout.build(heads, plan, max_prompt, num_visual_tokens, track_scores, shared_prompts)
                   for heads in plan.layers]
        self._backend = backends.resolve(backend, self.device, dtype, head_dim, plan.kv_format)
        self._layers = self._allocate(layouts)
        self._q_shape = (batch_size, num_query_heads, head_dim)
        self._kv_shape = (batch_size, plan.num_heads, head_dim)
        self._alignment = dtype.itemsize
        self.steps = StepCounts(plan.num_layers, batch_size, num_visual_tokens)
        self._shares = [PromptShares(layout.shared_prompts, batch_size) for layout in layouts]

    def _allocate(self, layouts: Sequence[LayerLayout]) -> list[LayerState]:
        needed = sum(layout.nbytes(self.batch_size, self.head_dim, self.dtype) for layout in layouts)
        cause: Exception | None = None
        # The first: where memory is promised before it is there, the process would be killed. The second: torch counts
        # so far.
        if not (self.device.type == "cpu" and needed > physical_memory()) and needed < 2**63:
            try:
                return [LayerState.allocate(layout, heads, self.batch_size, self.head_dim, self.dtype, self.device)
                        for layout, heads in zip(layouts, self.plan.layers, strict=True)]
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if type(error) is RuntimeError and "can't allocate memory" not in str(error):
                    raise
                cause = error
        raise MemoryError(
            f"a cache of {needed} bytes ({needed / 2**30:.1f} GiB) does not fit on {self.device}: lower batch_size = "
            f"{self.batch_size}, num_visual_tokens = {self.num_visual_tokens}, max_prompt = {self.max_prompt}, or the "
            f"plan's budget of {self.plan.budget(self.num_visual_tokens):.3g}") from cause

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    @property
    def nbytes(self) -> int:
        """Bytes allocated: slabs, their scales, scores, positions, cursors, head tables and pin masks of all layers."""
        return sum(state.nbytes for state in self._layers)

    @property
    def states(self) -> Sequence[LayerState]:
        """The layers' tensors, as backends receive them."""
        return self._layers

    def prefill(self, layer: int, k: torch.Tensor, v: torch.Tensor, prompt_lens: Sequence[int] | torch.Tensor,
                scores: torch.Tensor | None = None, rows: Sequence[int] | torch.Tensor | None = None,
                share: Sequence[int] | torch.Tensor | None = None) -> None:
        """Start rows with their prompts (docs/specification.md, sections 3.5 and 3.12).

        Args:
            layer: layer index.
            k, v: ``[N, H, P, D]`` rotated; entry i is valid in ``[0, prompt_lens[i])``. N is the batch size, or the
                number of ``rows``, or the number of prompts that they ``share``.
            prompt_lens: N integers within 0 .. min(P, max_prompt).
            scores: float32 ``[N, H, P]`` to start from; None for zeros. Not where rows share prompts, unless the cache
                was made with ``track_scores=True``: these have no scores otherwise.
            rows: 1-D index of distinct batch rows to restart; the others go on undisturbed. None restarts all.
            share: which of the N prompts each of the rows takes; None: each its own. Only with the plan's
                ``keep_prompt``. A cache made without ``shared_prompts`` makes copies.

        Raises:
            TypeError, ValueError: an argument is wrong, or the different prompts of all rows are more than
                ``shared_prompts``; nothing has been written then.
        """
        state = self._layer(layer)
        indices = self._rows(rows)
        k, v = self._tensor("k", k, self.dtype), self._tensor("v", v, self.dtype)
        count = len(indices) if share is None or k.dim() != 4 else len(k)
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dim() != 4 or (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != (
                    count, self.plan.num_heads, self.head_dim):
                raise ValueError(f"{name} must be [N, H, P, D] = [{count}, {self.plan.num_heads}, P, "
                                 f"{self.head_dim}], got {list(tensor.shape)}")
        entries = list(range(count)) if share is None else checked_share(share, count, indices, self.plan)
        if k.shape != v.shape:
            raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
        lengths = integers("prompt_lens", prompt_lens)
        if len(lengths) != count:
            raise ValueError(f"prompt_lens must hold {count} lengths, got {len(lengths)}")
        limit = min(self.max_prompt, k.shape[2])
        for entry, length in enumerate(lengths):
            if not 0 <= length <= limit:
                raise ValueError(f"prompt_lens[{entry}] must be within 0 .. {limit} (max_prompt = {self.max_prompt}, "
                                 f"P = {k.shape[2]}), got {length}")
        if scores is not None:
            scores = self._tensor("scores", scores, torch.float32)
            if scores.shape != k.shape[:3]:
                raise ValueError(f"scores must be [N, H, P] = {list(k.shape[:3])}, got {list(scores.shape)}")
            if not state.layout.prompt_scores:
                raise ValueError("scores must be None, for shared prompts have none in a cache that was made without "
                                 f"track_scores=True, got {list(scores.shape)}")
        if state.shared:
            places = self._shares[layer].place(indices, entries)
            self._backend.prefill_shared(state, k, v, lengths, scores, indices, entries, places)
            self._shares[layer].assign(indices, entries, places)
        else:
            if share is not None:
                k, v, scores = k[entries], v[entries], None if scores is None else scores[entries]
                lengths = [lengths[entry] for entry in entries]
            self._backend.prefill(state, k, v, lengths, scores, indices)
        self.steps.restart(layer, indices)

    def decode(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               scale: float | None = None, rotary: Rotary | None = None) -> torch.Tensor:
        """One decode step of one layer for every row: append, attend, score, evict (docs/specification.md, section 3).

        Args:
            layer: layer index.
            q: ``[B, Hq, D]`` queries. k, v: ``[B, H, D]`` key and value of the new token. Unit stride in the last
                dimension.
            scale: factor on the dot products; None for 1 / sqrt(D).
            rotary: (cos, sin), float32 ``[N, D / 2]`` with N at least max_prompt + num_visual_tokens: q and k are
                rotated by their row's own position first (`ssd_kernels.reference.rotate`, the halves layout of Llama).
                None: they are rotated already.

        Returns:
            ``[B, Hq, D]``, contiguous, in the cache's dtype.

        Raises:
            TypeError, ValueError: an argument is wrong or a row has taken ``num_visual_tokens`` steps already;
                nothing has been written then.
        """
        state = self._layer(layer)
        compiling = torch.compiler.is_compiling()
        try:  # what `_checked_step` asks for, in half a microsecond
            fits = (type(q) is type(k) is type(v) is torch.Tensor
                    and q.shape == self._q_shape and k.shape == self._kv_shape == v.shape
                    and q.dtype == k.dtype == v.dtype == self.dtype
                    and q.device == k.device == v.device == self.device
                    and q.stride()[2] == k.stride()[2] == v.stride()[2] == 1
                    and (compiling or not (q.is_neg() or k.is_neg() or v.is_neg())
                         and (a := q.data_ptr()) > SUSPECT and (b := k.data_ptr()) > SUSPECT
                         and (c := v.data_ptr()) > SUSPECT and not (a | b | c) % self._alignment))
        except RuntimeError:  # some kinds of tensors have no shape, strides or address
            fits = False
        if not fits:
            q, k, v = self._checked_step(q, k, v)
        if scale is None:
            scale = 1.0 / math.sqrt(self.head_dim)
        elif isinstance(scale, (int, float)):
            scale = float(scale)  # Triton would compile anew for an int, inside a capture too
        else:
            raise TypeError(f"scale must be a number or None, got {scale!r}")
        if rotary is not None:
            rotary = ops.checked_rotary(rotary, self.max_prompt + self.num_visual_tokens, q, compiling)
        if compiling:
            out: torch.Tensor = torch.ops.ssd_kernels.decode(
                q, k, v, *state.tensors, *ops.layout_arguments(state.layout), scale, self._backend.name,
                *(rotary or (None, None)), *ops.shared_arguments(state), **ops.scale_arguments(state))
            return out
        self.steps.check(layer)
        result = self._backend.decode(state, q, k, v, scale, rotary)
        self.steps.count(layer)
        return result

    def warmup(self, rotary: bool = False) -> float:
        """Compile the kernels that `decode` and `prefill` will run, where the backend compiles at first use; changes
        nothing.

        Call it before capturing a CUDA graph. Triton keeps what it compiled on disk, so that another process finds it.

        Args:
            rotary: for `decode` with ``rotary``.

        Returns:
            the seconds it took, which are also logged when they are many.
        """
        began = time.monotonic()
        self._backend.warmup(self._layers, self.num_query_heads, rotary)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.monotonic() - began
        if seconds > NOTICEABLE_SECONDS:
            _logger.warning("compiled %s kernels in %.1f s; they are kept for the next time", self.backend, seconds)
        return seconds

    def set_recent(self, layer: int, recent: torch.Tensor) -> None:
        """Change how many of their newest tokens the heavy heads of a layer protect, before anything was evicted.

        A heavy head that protects all its M tokens is a window; so heads can be typed while a picture is drawn. Writes
        the head table on the device and reads nothing back; numbers beyond 0 .. M count as the nearest of these, and
        heads that are not heavy stay as they are. ``plan`` goes on saying what the cache was made with. The change
        stays, for rows that restart too, until it is called again.

        Args:
            layer: layer index.
            recent: ``[H]`` integers on the cache's device.

        Raises:
            TypeError, ValueError: an argument is wrong, or a row may have evicted tokens already.
        """
        state = self._layer(layer)
        recent = plain("recent", recent)
        if recent.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"recent must be an int32 or int64 tensor, got {recent.dtype}")
        if recent.shape != (self.plan.num_heads,) or recent.device != self.device:
            raise ValueError(f"recent must have shape [{self.plan.num_heads}] on {self.device}, got "
                             f"{list(recent.shape)} on {recent.device}")
        heavy = [spec.kind == "heavy" for spec in self.plan.layers[layer]]
        sizes = [spec.size or 0 for spec in self.plan.layers[layer]]
        smallest = min((size for size, is_heavy in zip(sizes, heavy, strict=True) if is_heavy), default=0)
        steps = self.steps.most(layer)
        if any(heavy) and (steps > smallest or not self.plan.keep_prompt):
            raise ValueError(f"set_recent must come before a heavy head evicts, within {smallest} steps and with "
                             f"keep_prompt, got {steps} steps and keep_prompt={self.plan.keep_prompt}")
        column = state.table[:, RECENT]
        if any(heavy):
            limits = torch.tensor(sizes, dtype=torch.int32).to(self.device, non_blocking=True)
            chosen = torch.tensor(heavy).to(self.device, non_blocking=True)
            wanted = torch.minimum(recent.clamp(0, KEEP_ALL).to(torch.int32), limits)
            column.copy_(torch.where(chosen, wanted, column))

    def positions(self, layer: int, head: int) -> list[torch.Tensor]:
        """Kept positions of one KV head: a LongTensor per batch row, ascending, on the cache's device."""
        state = self._layer(layer)
        self._check_index("head", head, self.plan.num_heads)
        return [torch.tensor(sorted(self._kept(state, head, row)), dtype=torch.long, device=self.device)
                for row in range(self.batch_size)]

    def scores(self, layer: int, head: int) -> list[torch.Tensor]:
        """Running score sums of one KV head: per batch row float32, aligned with `positions`.

        They are sums of attention probabilities whatever the head's rule, but for ``score="decayed"``, whose sums have
        decayed. Shared prompts have none, unless the cache was made with ``track_scores=True``: NaN stands for theirs.

        Raises:
            ValueError: the head is not heavy and the cache was made without ``track_scores=True``.
        """
        state = self._layer(layer)
        self._check_index("head", head, self.plan.num_heads)
        span = state.layout.heads[head]
        if span.score_offset < 0:
            raise ValueError(f"head {head} of layer {layer} is a {span.kind} head and keeps no scores; make the cache "
                             "with track_scores=True")
        result = []
        for row in range(self.batch_size):
            view = self._view(state, head, row)
            kept = self._kept(state, head, row)
            slots = [kept[position] for position in sorted(kept)][view.unscored:]
            at = torch.tensor(slots, dtype=torch.long, device=self.device) + view.score_origin
            nothing = torch.full((view.unscored,), math.nan, device=self.device)
            result.append(torch.cat([nothing, state.scores[row, at]]))
        return result

    def reset(self, rows: Sequence[int] | torch.Tensor | None = None) -> None:
        """Empty all layers of ``rows`` (None: of every row), as if nothing had been prefilled."""
        indices = self._rows(rows)
        for layer, state in enumerate(self._layers):
            state.cursors[torch.tensor(indices, dtype=torch.long, device=self.device)] = 0
            self._shares[layer].release(indices)
            self.steps.restart(layer, indices)

    def finish(self, rows: Sequence[int] | torch.Tensor) -> None:
        """Let all layers of ``rows`` take no more steps until they restart: GPU backends leave them as they are from
        now on, and what `decode` returns for them means nothing; on a CPU it raises.

        So a row costs nothing while others go on, in a captured step too. Their shared prompts are free.

        Raises:
            TypeError, ValueError: ``rows`` are not distinct rows.
        """
        indices = self._rows(rows)
        at = torch.tensor(indices, dtype=torch.long, device=self.device)
        for layer, state in enumerate(self._layers):
            state.cursors[:, 1].index_fill_(0, at, self.num_visual_tokens)
            self._shares[layer].release(indices)
            self.steps.restart(layer, indices, finished=True)

    @staticmethod
    def _view(state: LayerState, head: int, row: int) -> RowView:
        prompt_len, step = state.cursors[row].tolist()
        return RowView.of(state.layout, head, prompt_len, step)

    def _kept(self, state: LayerState, head: int, row: int) -> dict[int, int]:
        """Slot of every kept position, as `RowView` numbers them."""
        view = self._view(state, head, row)
        slots = view.slots()
        if view.head.kind != "heavy":
            return dict(zip(view.positions(), slots, strict=True))
        stored = state.positions[row, view.score_origin + view.unscored:view.score_origin + view.head.capacity]
        positions = [*range(view.unscored), *stored.tolist()]
        return {positions[slot]: slot for slot in slots}

    def _layer(self, layer: int) -> LayerState:
        self._check_index("layer", layer, len(self._layers))
        return self._layers[layer]

    @staticmethod
    def _check_index(name: str, value: int, limit: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be within 0 .. {limit - 1}, got {value}")

    def _rows(self, rows: Sequence[int] | torch.Tensor | None) -> list[int]:
        if rows is None:
            return list(range(self.batch_size))
        indices = integers("rows", rows)
        for row in indices:
            if not 0 <= row < self.batch_size:
                raise ValueError(f"rows must be within 0 .. {self.batch_size - 1}, got {row}")
        if len(set(indices)) != len(indices):
            raise ValueError(f"rows must be distinct, got {indices}")
        return indices

    def _tensor(self, name: str, tensor: object, dtype: torch.dtype) -> torch.Tensor:
        """``tensor`` as kernels read it; TypeError or ValueError unless it is of this dtype and on the device."""
        tensor = plain(name, tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, got {tensor.device}")
        return tensor

    def _checked_step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Decode's tensors as kernels read them, or what is wrong with them."""
        tensors = []
        for name, given, shape in (("q", q, self._q_shape), ("k", k, self._kv_shape), ("v", v, self._kv_shape)):
            tensor = self._tensor(name, given, self.dtype)
            tensors.append(tensor)
            if tensor.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.stride(-1) != 1:
                raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tensor.stride()}")
        return tensors
