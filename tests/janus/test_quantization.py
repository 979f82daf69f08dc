"""Models whose weights are tensors of torchao's: by a stand-in, and by torchao itself in a process of its own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional

from ssd_janus.checkpoints import fingerprint
from ssd_janus.engine import Engine, Sampling, memory, unfuse, unsupported
from ssd_janus.engine.linear import KernelLinear
from ssd_janus.engine.weights import Weights
from ssd_janus.quantization import dense, has_quantized_weights, in_bytes, is_quantized, quantize, stored_bytes

TORCHAO = Path(__file__).resolve().parents[2] / "build/torchao"
GREEDY = Sampling(greedy=True)


class Bytes(torch.Tensor):
    """A matrix as signed bytes with a scale per row, as torchao's: says that it has the dtype it stands for."""

    products = 0  # that were made of all

    @staticmethod
    def __new__(cls, qdata: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None,
                **said: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.float32)

    def __init__(self, qdata: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None,
                 **said: Any) -> None:
        self.qdata, self.scale, self.zero_point, self.said = qdata, scale, zero_point, said

    def __tensor_flatten__(self) -> Any:
        names = ["qdata", "scale", *(["zero_point"] if self.zero_point is not None else [])]
        return names, {"block_size": [1, 9], "dtype": torch.float32, "act_quant_kwargs": None, **self.said}

    def dequantize(self) -> torch.Tensor:
        return (self.qdata if self.zero_point is None else self.qdata - self.zero_point.float()) * self.scale.float()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.linear:
            Bytes.products += 1
            return functional.linear(args[0], dense(args[1]), *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default), function
        return cls(args[0].qdata, args[0].scale, args[0].zero_point, **args[0].said)


Bytes.__module__ = "torchao.stand_in"


def quantized_copy(model: Any, change: Callable[[Bytes], Bytes] = lambda weight: weight, part: str = "layers") -> Any:
    """A copy with quantized weights, changed, and one with the plain weights that these stand for."""
    copies = quantized, plain = copy.deepcopy(model), copy.deepcopy(model)
    parts = [copied.model.language_model.layers if part == "layers" else getattr(copied.model, part)
             for copied in copies]
    for one, other in zip(*(part.modules() for part in parts), strict=True):
        if isinstance(one, nn.Linear):
            scale = one.weight.detach().abs().amax(1, keepdim=True) / 127
            weight = change(Bytes((one.weight.detach() / scale).round().to(torch.int8), scale))
            one.weight, other.weight = (nn.Parameter(tensor, requires_grad=False)
                                        for tensor in (weight, weight.dequantize()))
    return quantized, plain


def prompts_of(model: Any) -> list[list[int]]:
    inputs = tiny.image_inputs()
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def with_biases(model: Any) -> Any:
    for module in model.model.language_model.layers.modules():
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(0.1 * torch.randn(module.out_features))
    return model


@pytest.mark.parametrize("part", ["layers", "generation_head"])
@pytest.mark.parametrize("products", ["kernel", "torch"])
@pytest.mark.parametrize("biased", [False, True])
def test_bytes_are_drawn_with(biased: bool, products: str, part: str) -> None:
    model = tiny.build_model(heads=4, kv_heads=2)
    quantized, plain = quantized_copy(with_biases(model) if biased else model, part=part)
    assert unsupported(quantized) is None
    assert has_quantized_weights(quantized) and not has_quantized_weights(plain)
    bytes_before, asked_before = memory.weight_bytes(quantized), Bytes.products
    engine = Engine(quantized, products="auto" if products == "kernel" else products)
    assert engine.products == products and engine.exact == (products == "kernel")
    drawn = engine.generate(prompts_of(model), guidance=2.0, sampling=GREEDY)
    assert (Bytes.products > asked_before) == (products == "torch")
    expected = Engine(plain, products="torch").generate(prompts_of(model), guidance=2.0, sampling=GREEDY)
    assert torch.equal(drawn, expected)
    assert memory.weight_bytes(quantized) == bytes_before


def test_bytes_of_several_projections_lie_in_one_matrix_until_unfused(fresh: Any) -> None:
    quantized, plain = quantized_copy(fresh)
    layer, mlp = Engine(quantized).weights(9).layers[1], quantized.model.language_model.layers[1].mlp
    gated = layer.gated
    assert isinstance(gated, KernelLinear) and gated.stored.dtype == torch.int8
    assert gated.stored.data_ptr() == mlp.gate_proj.weight.qdata.data_ptr()
    assert gated.stored[len(mlp.gate_proj.weight):].data_ptr() == mlp.up_proj.weight.qdata.data_ptr()
    for expected in (plain, quantized):
        assert torch.equal(dense(mlp.up_proj.weight), dense(expected.model.language_model.layers[1].mlp.up_proj.weight))
    before = gated.stored
    assert Engine(quantized).weights(9).layers[1].gated.stored.data_ptr() == before.data_ptr()
    unfuse(quantized)
    for name, parameter in quantized.model.language_model.layers.named_parameters():
        if is_quantized(parameter):
            for held in in_bytes(parameter) or ():
                assert held.untyped_storage().nbytes() == held.nbytes, name
    assert torch.equal(dense(mlp.up_proj.weight), dense(plain.model.language_model.layers[1].mlp.up_proj.weight))


def test_bytes_draw_the_same_tokens_in_any_batch(fresh: Any) -> None:
    engine = Engine(quantized_copy(fresh)[0])
    prompts = prompts_of(fresh)
    prompts = [prompts[index % len(prompts)] for index in range(7)]
    together = engine.generate(prompts, guidance=2.0, seeds=5)
    for size in (1, 3):
        assert torch.equal(engine.generate(prompts, guidance=2.0, seeds=5, batch_size=size), together)


def test_bytes_are_never_left_to_torch(fresh: Any) -> None:
    """Also where it multiplies plain weights with many rows faster."""
    quantized, plain = quantized_copy(fresh)
    product, expected = (Weights.of(model, 9).prepared(kernel, 2).layers[0].gated
                         for model, kernel in ((quantized, True), (plain, False)))
    rows, asked_before = torch.randn(5, plain.model.language_model.config.hidden_size), Bytes.products
    torch.testing.assert_close(product(rows), expected(rows))
    assert Bytes.products == asked_before
    other, _ = quantized_copy(fresh, OTHER_FORMATS["one scale"])
    with pytest.raises(ValueError, match="linear must hold plain weights or bytes, got others of torchao's"):
        Weights.of(other, 9).prepared(True)


OTHER_FORMATS: dict[str, Callable[[Bytes], Bytes]] = {
    "a zero point": lambda weight: Bytes(weight.qdata, weight.scale, torch.ones_like(weight.scale).to(torch.int8)),
    "one scale": lambda weight: Bytes(weight.qdata, weight.scale.amax().view(1, 1)),
    "half scales": lambda weight: Bytes(weight.qdata, weight.scale.bfloat16()),
    "rows of x in bytes, too": lambda weight: Bytes(weight.qdata, weight.scale, act_quant_kwargs={"granularity": 1}),
    "columns": lambda weight: Bytes(weight.qdata.T.contiguous().T, weight.scale),
    "16 bits": lambda weight: Bytes(weight.qdata.short(), weight.scale),
}


@pytest.mark.parametrize("change", OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_torchao_multiplies_with_its_other_formats(fresh: Any, change: Callable[[Bytes], Bytes]) -> None:
    quantized, plain = quantized_copy(fresh, change)
    engine, expected = Engine(quantized), Engine(plain, products="torch", exact=False)
    assert engine.products == "torch" and not engine.exact
    drawn = engine.generate(prompts_of(fresh), guidance=2.0, sampling=GREEDY)
    assert torch.equal(drawn, expected.generate(prompts_of(fresh), guidance=2.0, sampling=GREEDY))
    unfuse(quantized)
    assert all(is_quantized(layer.self_attn.q_proj.weight) for layer in quantized.model.language_model.layers)
    with pytest.raises(ValueError, match="got 'kernel': torchao multiplies with weights in its other formats"):
        Engine(quantized, products="kernel")


def test_a_zero_point_of_zero_is_none(fresh: Any) -> None:
    quantized, _ = quantized_copy(fresh, lambda weight: Bytes(
        weight.qdata, weight.scale, torch.zeros_like(weight.scale).to(torch.int8), reduce_range=True))
    assert Engine(quantized).products == "kernel"
    for weight in (torch.zeros(2, 3), nn.Parameter(torch.zeros(2, 3))):
        assert in_bytes(weight) is None


def test_quantized_weights_are_counted_by_what_they_hold_and_told_apart(fresh: Any) -> None:
    quantized, plain = quantized_copy(fresh)
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
assert engine.products == "kernel" and engine.exact
drawn = engine.generate(prompts, sampling=greedy, steps=24)
for other in (Engine(plain), Engine(pipe.model, products="torch")):
    assert torch.equal(drawn, other.generate(prompts, sampling=greedy, steps=24))
sampled = engine.generate(prompts, steps=24)
assert torch.equal(engine.generate(prompts, steps=24, batch_size=1), sampled)
copied = copy.deepcopy(pipe.model)
assert torch.equal(Engine(copied).generate(prompts, steps=24), sampled)
fresh = Pipeline.from_pretrained(None, dtype=torch.float32).model
quantize(fresh)
fresh.load_state_dict(pipe.model.state_dict())
assert torch.equal(Engine(fresh).generate(prompts, steps=24), sampled)
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
