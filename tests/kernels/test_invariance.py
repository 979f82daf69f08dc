"""What a result must not depend on: the batch, the number of threads, the order of the slots."""

from __future__ import annotations

import pytest
import torch

from .cases import F32, Case, each_compiled_format, each_format, mixed
from .pair import Pair, bits, of_rows

STEPS = 15
ROWS = 5
THREADS = (1, 2, 3, 17)
FEW = 3  # rows, and every how many of the numbers of threads, where no threads of the host share a step's work


def _play(case: Case, rows: list[int], dtype: torch.dtype, row_buffer: int, prompt: int = 5, group: int = 2,
          head_dim: int = 40) -> tuple[torch.Tensor, ...]:
    """Outputs and everything kept of ``rows``, each row with its own inputs whatever the batch."""
    pair = Pair(mixed(8, row_buffer), case, batch=len(rows), group=group, head_dim=head_dim, max_prompt=prompt,
                steps=STEPS, dtype=dtype)
    draws = [torch.Generator().manual_seed(row) for row in rows]

    def draw(*shape: int) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(dtype).to(case.device)

    pair.cache.prefill(0, draw(8, prompt, head_dim), draw(8, prompt, head_dim),
                       [prompt - 5 + (row + 1) % 6 for row in rows])
    outs = [pair.cache.decode(0, draw(8 * group, head_dim), draw(8, head_dim), draw(8, head_dim))
            for _ in range(STEPS)]
    return torch.stack(outs, 1), *of_rows(pair.cache)


@each_compiled_format
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_row_does_not_depend_on_its_batch(case: Case, dtype: torch.dtype, row_buffer: int) -> None:
    """"a row's output, scores and kept sets are bitwise the same alone or in any batch"."""
    rows = ROWS if case.name == "cpu" else FEW
    together = _play(case, [*range(rows)], dtype, row_buffer)
    for row in range(rows):
        for many, alone in zip(together, _play(case, [row], dtype, row_buffer), strict=True):
            assert torch.equal(bits(many[row]), bits(alone[0]))
    backwards = [*range(0, rows, 2)][::-1]
    for many, other in zip(together, _play(case, backwards, dtype, row_buffer), strict=True):
        assert torch.equal(bits(many[backwards]), bits(other))


@each_compiled_format
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
def test_a_result_does_not_depend_on_threads(case: Case, row_buffer: int) -> None:
    """Batch invariance under other numbers of threads, more than there are cores or items included."""
    threads = torch.get_num_threads()
    # So long that a step of the CPU's pays on 17 threads.
    size = {"prompt": 480, "group": 8, "head_dim": 256} if case.name == "cpu" else {}
    try:
        results = []
        for count in THREADS if case.name == "cpu" else THREADS[::FEW]:
            torch.set_num_threads(count)
            results.append((_play(case, [0, 1, 2], F32, row_buffer, **size), _play(case, [1], F32, row_buffer, **size)))
    finally:
        torch.set_num_threads(threads)
    for many, alone in results:
        for one, two, three in zip(results[0][0], many, alone, strict=True):
            assert torch.equal(bits(one), bits(two)) and torch.equal(bits(one[1]), bits(three[0]))


@each_format
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
def test_output_does_not_depend_on_slot_order(case: Case, row_buffer: int) -> None:
    """"Output is independent of slot order": shuffle heavy heads' slots between steps, prompt and evictable apart."""
    pair = Pair(mixed(8, row_buffer), case, max_prompt=5, steps=STEPS)
    pair.prefill([5, 2])
    state = pair.cache._layers[0]
    for _ in range(STEPS):
        pair.step()
        for head, span in enumerate(state.layout.heads):
            for row, prompt_len in enumerate((5, 2)):
                count = len(pair.cache._kept(state, head, row))
                order = torch.cat([torch.randperm(prompt_len), prompt_len + torch.randperm(count - prompt_len)])
                if span.kind != "heavy":
                    continue
                for tensor, offset in (*((slab, span.offset) for slab in state.slabs),
                                       (state.scores, span.score_offset), (state.positions, span.score_offset)):
                    tensor[row, offset:offset + count] = tensor[row, offset + order]
        pair.check(0)
