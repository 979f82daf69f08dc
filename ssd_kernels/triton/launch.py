"""The host side of the Triton kernels: block sizes, limits and byte counts, as functions of plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout import LayerLayout, RowView

MAX_STEPS = 2**20 - 1  # the kernels count programs in the cursor's bits above these: decode.ARRIVALS
MAX_HEADS = 2**11 - 1
MIN_EVICT_BLOCK = 64
PART_SLOTS = 16  # that a warp multiplies at once: the depth of a product of 16-bit matrices
INT8_PART_SLOTS = 32  # the same bytes, and sums are rescaled half as often; too many registers where D exceeds 128


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def check_limits(heads: int, num_visual_tokens: int) -> None:
    """Raise ValueError if the cursors cannot count so many KV heads or steps."""
    if heads > MAX_HEADS or num_visual_tokens > MAX_STEPS:
        raise ValueError(f"the triton backend serves at most {MAX_HEADS} KV heads and {MAX_STEPS} visual tokens, got "
                         f"{heads} and {num_visual_tokens}")


@dataclass(frozen=True)
class DecodeConfig:
    """How `decode_kernel` is compiled for a layer.

    Attributes:
        matrices: products of 16-bit matrices, else multiply-adds.
        block: slots read at once.
        score_block: scores updated at once.
        copy_block: slots moved at once by a refresh.
        warps, stages: of 32 threads; blocks in flight.
        registers: at most, per thread.
    """

    matrices: bool
    block: int
    score_block: int
    copy_block: int
    warps: int
    stages: int
    registers: int


def decode_config(head_dim: int, item_size: int, group: int, evict_block: int, capability: int = 80,
                  int8: bool = False) -> DecodeConfig:
    """Block sizes by a small table, never by measuring: the first step costs what every other does.

    A program streams slots through shared memory, ``stages`` - 1 blocks ahead of the arithmetic, and several programs
    share a multiprocessor. What is not attention costs a program's every warp the same, so that two warps cost least;
    in half precision each multiplies 16 slots at once, 32 of those stored in 8 bits.

    Args:
        head_dim: D. item_size: bytes of an element of q, k and v. group: query heads per KV head.
        evict_block: slots that one program ranks at once, a power of two.
        capability: compute capability, 80 for 8.0; 86 and 89 have less shared memory.
        int8: whether keys and values are stored in 8 bits.
    """
    dim = power_of_two(head_dim)
    matrices = item_size == 2
    if matrices:
        halves = max(1, dim // 128)
        warps = (2 if evict_block <= 1024 else 4) * halves
        block = (INT8_PART_SLOTS if int8 and halves == 1 else PART_SLOTS) * warps // halves
        # With fewer, some release of Triton spills: 3.9 in 16 bits, 3.6 and, with groups, 3.8 in 8 bits.
        if int8 and group == 1 and halves == 1:
            registers = 144 if dim <= 64 else 200
        else:
            registers = 168 if dim <= 64 else 255
    else:
        warps = 4 if group <= 4 else 8
        block = max(8, (2048 if group == 1 else 1024) // dim)
        registers = 128 if group == 1 else 255
    buffers = (24 if capability in (86, 89) else 38) * 1024 // (2 * block * dim * (1 if int8 else item_size))
    return DecodeConfig(matrices, block, 32 * warps, max(16, min(32, 4096 // dim)), warps, 1 + max(1, min(3, buffers)),
                        registers)


def compile_options(**options: int) -> dict[str, int]:
    """What Triton is told at every launch and every compilation ahead of time: ``options``, and to fuse multiply-adds.

    Fused, a product and its sum take one instruction and are rounded once. Triton's default depends on its release and
    on the environment, and results must not. A program's arithmetic is the same for every batch, fused or not.
    """
    return {"enable_fp_fusion": True, **options}


def decode_constants(head_dim: int, item_size: int, group: int, row_buffer: int, largest: int, scored: bool,
                     keep_prompt: bool, rotary: bool, capability: int = 80, shared: bool = False,
                     prompt_scores: bool = True, int8: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """What `decode_kernel` is compiled with, for launches and ahead of time alike.

    Args:
        head_dim, item_size, group, capability: as in `decode_config`.
        row_buffer, largest, keep_prompt: of the layer's layout. scored: whether any of its heads is.
        rotary: whether q and k are rotated in the launch. shared: whether rows share prompts.
        prompt_scores: whether kept prompt tokens have scores. int8: whether keys and values are stored in 8 bits.

    Returns:
        the kernel's constants, by name, and Triton's options.
    """
    evict_block = max(power_of_two(largest), MIN_EVICT_BLOCK)
    config = decode_config(head_dim, item_size, group, evict_block, capability, int8)
    return {"INT8": int8, "KEEP_PROMPT": keep_prompt, "SHARED": shared, "PROMPT_SCORES": prompt_scores,
            "EVERY_STEP": row_buffer <= 1, "SCORED": scored, "ROTARY": rotary, "D": head_dim,
            "D_PAD": power_of_two(head_dim), "GROUP": group, "GROUP_PAD": power_of_two(group),
            "MATRICES": config.matrices, "BLOCK": config.warps if config.matrices else config.block,
            "SCORE_BLOCK": config.score_block, "EVICT_BLOCK": evict_block, "COPY_BLOCK": config.copy_block,
            "STAGES": config.stages}, compile_options(num_warps=config.warps, maxnreg=config.registers)


def prefill_constants(head_dim: int, item_size: int, longest: int, keep_prompt: bool, given: bool,
                      int8: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """What `prefill_kernel` is compiled with, for launches and ahead of time alike.

    Args:
        head_dim, item_size: as in `decode_config`. longest: prompt tokens. keep_prompt: of the layer's layout.
        given: whether tokens come with scores. int8: whether keys and values are stored in 8 bits.

    Returns:
        the kernel's constants, by name, and Triton's options.
    """
    block = power_of_two(longest)
    return {"INT8": int8, "KEEP_PROMPT": keep_prompt, "GIVEN": given, "D": head_dim, "D_PAD": power_of_two(head_dim),
            "PROMPT_BLOCK": block, "BLOCK": decode_config(head_dim, item_size, 1, block).copy_block
            }, compile_options(num_warps=4)


def step_bytes(layout: LayerLayout, prompt_len: int, step: int, head_dim: int, item_size: int,
               query_heads: int | None = None) -> int:
    """Bytes that one decode step of one layer has to move for one batch row: the floor of its time.

    Keys and values of every kept slot are read once and the new token's are written; a scored head's scores are read
    and written, its new position is written, and at a refresh its positions are read; q, k and v are read and the
    output is written; cursors are read and written. Moves of evicted slots depend on the data and are left out.

    Args:
        layout: of the layer. prompt_len, step: cursors of the row before the step.
        head_dim: D. item_size: bytes of an element of q, k and v. query_heads: Hq; None for one per KV head.
    """
    heads = len(layout.heads)
    vector = head_dim * item_size
    stored = vector if layout.kv_format == "auto" else head_dim + 4  # bytes and a scale
    total = 16 + vector * (2 * (query_heads or heads) + 2 * heads)
    for head, span in enumerate(layout.heads):
        view = RowView.of(layout, head, prompt_len, step)
        kept = view.base + view.evictable
        total += 2 * stored * (kept + 1)
        if span.score_offset >= 0:
            total += 8 * (kept - view.unscored) + 8
            if span.kind == "heavy" and (step + 1) % view.period == 0:
                total += 4 * view.evictable
    return total
