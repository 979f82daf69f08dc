"""A small model with LlamaGen's interface and its way of writing pictures, and a loop of the same shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

LAYERS, HEADS, GRID, CODES, PROMPT = 2, 4, 6, 48, 9


class KVCache(nn.Module):
    """Keys and values [B, H, positions, D] of one layer."""

    def __init__(self, rows: int, positions: int, heads: int, channels: int) -> None:
        super().__init__()
        self.keys = nn.Buffer(torch.zeros(rows, heads, positions, channels))
        self.values = nn.Buffer(torch.zeros(rows, heads, positions, channels))

    def update(self, input_pos: torch.Tensor, k_val: torch.Tensor, v_val: torch.Tensor
               ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[:, :, input_pos], self.values[:, :, input_pos] = k_val, v_val
        return self.keys, self.values


class Attention(nn.Module):
    def __init__(self, width: int, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads, self.channels = kv_heads, width // HEADS
        self.qkv = nn.Linear(width, (HEADS + 2 * kv_heads) * self.channels, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.kv_cache: Any = None

    def forward(self, hidden: torch.Tensor, table: torch.Tensor, input_pos: torch.Tensor,
                mask: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(hidden).unflatten(2, (-1, self.channels)).split([HEADS, self.kv_heads, self.kv_heads], 2)
        query, keys = (turned(tensor, table) for tensor in heads[:2])
        query, keys, values = (tensor.transpose(1, 2) for tensor in (query, keys, heads[2]))
        keys, values = self.kv_cache.update(input_pos, keys, values)
        keys, values = (tensor.repeat_interleave(HEADS // self.kv_heads, dim=1) for tensor in (keys, values))
        out = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=False,
                                                      dropout_p=0)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, kv_heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, kv_heads)
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norms[0](hidden), *rest)
        return hidden + self.mlp(self.norms[1](hidden))


class Model(nn.Module):
    """Conditions are embeddings [B, PROMPT, width], unrotated: cosine and sine are 0 there."""

    def __init__(self, kv_heads: int = HEADS, width: int = 128) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_layer=LAYERS, n_head=HEADS, n_kv_head=kv_heads, dim=width,
                                      block_size=GRID * GRID)
        self.codes = nn.Embedding(CODES, width)
        self.layers = nn.ModuleList([Block(width, kv_heads) for _ in range(LAYERS)])
        self.head = nn.Linear(width, CODES, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 1.0)
        self.rotary = table(GRID, width // HEADS)

    def setup_caches(self, max_batch_size: int, max_seq_length: int, dtype: torch.dtype) -> None:
        for layer in self.layers:
            own = layer.attention
            own.kv_cache = KVCache(max_batch_size, max_seq_length, own.kv_heads, own.channels).to(dtype)
        self.causal_mask = torch.ones(max_batch_size, max_seq_length, max_seq_length, dtype=torch.bool).tril()

    def forward(self, hidden: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        mask = self.causal_mask[:len(hidden), None, input_pos]
        for layer in self.layers:
            hidden = layer(hidden, self.rotary[input_pos], input_pos, mask)
        return self.head(hidden[:, -1])


def table(grid: int, channels: int) -> torch.Tensor:
    """[PROMPT + grid * grid, D / 2, 2] cosines and sines: half of the pairs turn with the row, half with the column."""
    speeds = 10000.0 ** -(torch.arange(channels // 4) / (channels // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = torch.cat([place.flatten()[:, None] * speeds for place in (row, column)], 1)
    return torch.cat([torch.zeros(PROMPT, channels // 2, 2), torch.stack([angles.cos(), angles.sin()], 2)])


def turned(tensor: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``tensor`` [B, T, H, D], whose neighbouring channels are pairs, turned by ``table`` [T, D / 2, 2]."""
    first, second = tensor.unflatten(3, (-1, 2)).unbind(4)
    cosine, sine = table[None, :, None].unbind(4)
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], 4).flatten(3)


@torch.no_grad()
def generate(model: Model, condition: torch.Tensor, padding: torch.Tensor, steps: int = GRID * GRID, scale: float = 3.0,
             seed: int = 0, sample: bool = True) -> torch.Tensor:
    """Codes [B, steps] for conditions [B, PROMPT, width] of which ``padding`` [B, PROMPT] says what is real."""
    torch.manual_seed(seed)
    hidden = torch.cat([condition, torch.zeros_like(condition)])  # conditional rows, then null ones
    model.setup_caches(max_batch_size=len(hidden), max_seq_length=PROMPT + steps, dtype=condition.dtype)
    model.causal_mask[:, :, :PROMPT] &= torch.cat([padding, padding]).bool()[:, None]
    model.causal_mask |= torch.eye(PROMPT + steps, dtype=torch.bool)
    positions, drawn = torch.arange(PROMPT), []
    for step in range(steps):
        wanted, null = model(hidden, positions).chunk(2)
        logits = null + (wanted - null) * scale
        token = torch.multinomial(logits.softmax(-1), 1) if sample else logits.argmax(-1, keepdim=True)
        drawn.append(token)
        hidden, positions = model.codes(torch.cat([token, token])), torch.tensor([PROMPT + step])
    return torch.cat(drawn, 1)
