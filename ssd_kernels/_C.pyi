"""The compiled extension, csrc/bindings.cpp. Addresses are ``Tensor.data_ptr()``, strides count elements."""

from typing import Any

# What both layers share; no class of the module.
class _BoundLayer:
    def __init__(self, keys: int, values: int, scores: int, positions: int, cursors: int, table: int, pinned: int,
                 dtype: int, batch: int, heads: int, head_dim: int, slots: int, scored_slots: int, max_prompt: int,
                 num_visual_tokens: int, row_buffer: int, keep_prompt: bool, prompt_keys: int, prompt_values: int,
                 prompt_of: int, shared_prompts: int, prompt_scores: bool, key_scales: int, value_scales: int,
                 prompt_key_scales: int, prompt_value_scales: int) -> None: ...

class Layer(_BoundLayer):
    def decode(self, q: int, k: int, v: int, out: int, query_heads: int, q_row_stride: int, q_head_stride: int,
               k_row_stride: int, k_head_stride: int, v_row_stride: int, v_head_stride: int, scale: float,
               cos: int, sin: int, threads: int) -> None: ...
    def decode_threads(self, query_heads: int, threads: int) -> int: ...
    def prefill(self, k: int, v: int, scores: int, prompt_stride: int, prompt_lens: list[int], rows: list[int],
                threads: int) -> None: ...

class Linear:
    """A matrix and what comes before and after a product with it; 0: no scale, no bias, no norm, nothing to add."""

    def __init__(self, dtype: int, weight: int, scale: int, bias: int, norm: int, epsilon: float, silu: bool,
                 gated: bool, inputs: int, outputs: int) -> None: ...
    def run(self, x: int, x_stride: int, rows: int, plus: int, plus_stride: int, out: int, threads: int) -> None: ...

def build_info() -> dict[str, Any]: ...
def worthwhile_threads(bytes: int, multiplications: int, threads: int) -> int: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...

# Only where CUDA was built. Streams are handles, ``prompt_lens`` and ``rows`` addresses on the device.
CUDA_PART_SLOTS: int
CUDA_MAX_PARTS: int
CUDA_MAX_STEPS: int

class CUDALayer(_BoundLayer):
    def decode(self, q: int, k: int, v: int, out: int, query_heads: int, q_row_stride: int, q_head_stride: int,
               k_row_stride: int, k_head_stride: int, v_row_stride: int, v_head_stride: int, scale: float,
               cos: int, sin: int, partials: int, logits: int, arrivals: int, parts: int, largest: int,
               device: int, stream: int) -> None: ...
    def prefill(self, k: int, v: int, scores: int, prompt_stride: int, count: int, prompt_lens: int, rows: int,
                device: int, stream: int) -> None: ...

def cuda_unavailable() -> str | None: ...
def cuda_decode_launch(batch: int, heads: int, query_heads: int, head_dim: int, parts: int,
                       largest: int, int8: bool = False) -> tuple[int, int, int]: ...
