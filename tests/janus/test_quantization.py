"""Models whose weights are tensors of torchao's: by a stand-in, and by torchao itself in a process of its own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional

from ssd_janus.checkpoints import fingerprint
from ssd_janus.engine import Engine, Sampling, memory, unfuse, unsupported
from ssd_janus.quantization import dense, has_quantized_weights, is_quantized, quantize, stored_bytes

TORCHAO = Path(__file__).resolve().parents[2] / "build/torchao"
GREEDY = Sampling(greedy=True)


class Bytes(torch.Tensor):
    """A matrix as signed bytes with a scale per row, as torchao's: says that it has the dtype it stands for."""

    @staticmethod
    def __new__(cls, digits: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, digits.shape, dtype=scale.dtype)

    def __init__(self, digits: torch.Tensor, scale: torch.Tensor) -> None:
        self.digits, self.scale = digits, scale

    def __tensor_flatten__(self) -> Any:
        return ["digits", "scale"], None

    def dequantize(self) -> torch.Tensor:
        return self.digits * self.scale

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.linear:
            return functional.linear(args[0], dense(args[1]), *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default), function
        return cls(args[0].digits, args[0].scale)


Bytes.__module__ = "torchao.stand_in"


def in_bytes(model: Any) -> Any:
    """A copy with quantized layers, and one with the plain weights that these stand for."""
    quantized, plain = copy.deepcopy(model), copy.deepcopy(model)
    for one, other in zip(quantized.model.language_model.layers.modules(), plain.model.language_model.layers.modules(),
                          strict=True):
        if isinstance(one, nn.Linear):
            scale = one.weight.detach().abs().amax(1, keepdim=True) / 127
            weight = Bytes((one.weight.detach() / scale).round().to(torch.int8), scale)
            one.weight, other.weight = (nn.Parameter(tensor, requires_grad=False)
                                        for tensor in (weight, weight.dequantize()))
    return quantized, plain


def prompts_of(model: Any) -> list[list[int]]:
    inputs = tiny.image_inputs()
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


@pytest.mark.parametrize("biased", [False, True])
def test_quantized_weights_are_drawn_with(biased: bool) -> None:
    model = tiny.build_model(heads=4, kv_heads=2)
    if biased:
        for module in model.model.language_model.layers.modules():
            if isinstance(module, nn.Linear):
                module.bias = nn.Parameter(0.1 * torch.randn(module.out_features))
    quantized, plain = in_bytes(model)
    assert unsupported(quantized) is None
    assert has_quantized_weights(quantized) and not has_quantized_weights(plain)
    engine, expected = Engine(quantized), Engine(plain, products="torch", exact=False)
    assert engine.products == "torch" and not engine.exact
    drawn = engine.generate(prompts_of(model), guidance=2.0, sampling=GREEDY)
    assert torch.equal(drawn, expected.generate(prompts_of(model), guidance=2.0, sampling=GREEDY))
    unfuse(quantized)
    assert all(is_quantized(layer.self_attn.q_proj.weight) for layer in quantized.model.language_model.layers)
    with pytest.raises(ValueError, match="got 'kernel': torchao multiplies with its weights"):
        Engine(quantized, products="kernel")


def test_quantized_weights_are_counted_by_what_they_hold_and_told_apart(fresh: Any) -> None:
    quantized, plain = in_bytes(fresh)
    saved = sum(3 * module.weight.numel() - 4 * module.out_features
                for module in fresh.model.language_model.layers.modules() if isinstance(module, nn.Linear))
    assert memory.weight_bytes(quantized) == memory.weight_bytes(plain) - saved
    assert fingerprint(quantized) == fingerprint(plain) != fingerprint(fresh)
    weight = quantized.model.language_model.layers[0].mlp.up_proj.weight
    assert stored_bytes(weight) == weight.numel() + 4 * len(weight)


def test_unknown_formats_and_the_missing_extra_are_named(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="weights must be one of int8, got 'int3'"):
        quantize(fresh, "int3")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[quantize\]'"):
        quantize(fresh)


WITH_TORCHAO = """
import copy, sys, torch
from ssd_janus import Pipeline
from ssd_janus.engine import Engine, Sampling, memory
from ssd_janus.quantization import dense, has_quantized_weights, quantize

pipe = Pipeline.from_pretrained(None, dtype=torch.float32)
plain = copy.deepcopy(pipe.model)
quantize(pipe.model)
assert has_quantized_weights(pipe.model)
for (name, mine), (_, other) in zip(pipe.model.named_parameters(), plain.named_parameters(), strict=True):
    other.data.copy_(dense(mine.detach()))
prompts = pipe.prompt_tokens(["two blue squares above a red circle", "a green star"])
greedy = Sampling(greedy=True)
engine = Engine(pipe.model)
drawn = engine.generate(prompts, sampling=greedy, steps=24)
assert torch.equal(drawn, Engine(plain).generate(prompts, sampling=greedy, steps=24))
layers = memory.weight_bytes(pipe.model.model.language_model), memory.weight_bytes(plain.model.language_model)
assert layers[0] < 0.3 * layers[1], layers
assert len(pipe(["a green star"], seed=3)) == 1
"""


@pytest.mark.serve
def test_torchaos_own_weights() -> None:
    """In a process of its own: transformers imports torchao wherever it finds it."""
    if not TORCHAO.is_dir():
        pytest.skip("build/torchao is not there (make test-serve)")
    path = os.pathsep.join([str(TORCHAO), *sys.path])
    run = subprocess.run([sys.executable, "-c", WITH_TORCHAO], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": path})
    assert run.returncode == 0, run.stderr
