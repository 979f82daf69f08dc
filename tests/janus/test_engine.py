"""The engine draws transformers' tokens, and every picture the same ones in any company."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from instruction_sets import using
from safetensors.torch import load_file, save_model
from test_generate import RAGGED, conditional_tokens
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ssd_janus import enable
from ssd_janus.engine import Engine, Sampling, unfuse, unsupported, weights
from ssd_janus.engine import linear as products
from ssd_janus.engine.linear import KernelLinear, Linear, Norm, most_rows
from ssd_kernels import CachePlan, HeadSpec, native

WORDS = "a red circle two blue squares and green star above three pink rings heart black cross".split()


def prompts_of(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """Token numbers without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def many_prompts(count: int) -> tuple[str, ...]:
    return tuple(" ".join(WORDS[index % 7:index % 7 + 1 + index % 5]) for index in range(count))


def plan_of_budget(model: Any, budget: float) -> CachePlan:
    """Heads of several kinds that keep about ``budget`` of the picture."""
    heads, size = model.config.text_config.num_key_value_heads, max(1, round(budget * tiny.TOKENS))
    if budget == 1:
        return CachePlan.uniform(HeadSpec.full(), tiny.LAYERS, heads)
    kinds = [HeadSpec.heavy(size, size // 2, "mean"), HeadSpec.window(size), HeadSpec.heavy(size), HeadSpec.window(1)]
    return tiny.plan_of(*kinds[:heads])


@pytest.mark.parametrize("options", [
    {"do_sample": False}, {"do_sample": True}, {"do_sample": True, "top_k": 0, "temperature": 0.7},
    {"do_sample": True, "top_k": 20, "top_p": 0.8}, {"do_sample": False, "guidance_scale": 5.0},
], ids=str)
def test_a_full_plan_gives_transformers_tokens(model: Any, options: dict[str, Any]) -> None:
    expected = tiny.draw(model, 3, **options)
    torch.manual_seed(3)
    drawn = Engine(model).generate(prompts_of(tiny.image_inputs()), guidance=options.get("guidance_scale", 2.0),
                                   seeds=None, sampling=Sampling.of(model, **options))
    assert torch.equal(drawn, expected)
    assert torch.equal(tiny.draw(model, 3, **options), expected), "the engine must leave the model as it was"


@pytest.mark.parametrize("name", RAGGED)
def test_other_plans_give_the_oracles_tokens(model: Any, name: str) -> None:
    plan = RAGGED[name](model.config.text_config.num_key_value_heads)
    inputs = tiny.image_inputs()
    expected = tiny.Oracle(plan).generate(model, **inputs)
    drawn = Engine(model, plan).generate(prompts_of(inputs), guidance=2.0, sampling=Sampling(greedy=True))
    assert torch.equal(drawn, expected)


def test_without_guidance_a_picture_takes_one_row(model: Any) -> None:
    inputs, engine = tiny.image_inputs(), Engine(model)
    drawn = engine.generate(prompts_of(inputs), guidance=1.0, sampling=Sampling(greedy=True))
    assert torch.equal(drawn, conditional_tokens(model, inputs))
    assert engine.last_run is not None and engine.last_run.rows == len(drawn)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_picture_alone_is_transformers_own_of_its_seed(model: Any, seed: int) -> None:
    inputs = tiny.image_inputs(tiny.PROMPTS[1:2])
    drawn = Engine(model).generate(prompts_of(inputs), guidance=2.0, seeds=seed,
                                   sampling=Sampling.of(model, do_sample=True))
    assert torch.equal(drawn, tiny.draw(model, seed, do_sample=True, **inputs))


@pytest.mark.parametrize("count, budget", [(1, 0.2), (3, 1), (7, 0.05), (64, 0.2)])
def test_a_picture_is_the_same_in_any_company(model: Any, count: int, budget: float) -> None:
    """Other prompts, lengths, guidance, order and batch sizes around it change nothing."""
    engine = Engine(model, plan_of_budget(model, budget))
    prompts = prompts_of(tiny.image_inputs(many_prompts(count)))
    guidance = [(2.0, 1.0, 5.0, 0.0)[index % 4] for index in range(count)]
    together = engine.generate(prompts, guidance=guidance, seeds=10)
    some = sorted({0, 1, count - 1} & {*range(count)})
    for index in some:
        alone = engine.generate([prompts[index]], guidance=guidance[index], seeds=10 + index)
        assert torch.equal(alone[0], together[index])
    mixed = some[::-1]
    assert torch.equal(together[mixed], engine.generate(
        [prompts[index] for index in mixed], guidance=[guidance[index] for index in mixed],
        seeds=[10 + index for index in mixed], batch_size=2))
    assert len({tuple(row) for row in together.tolist()}) == count


def logits_of(engine: Engine, prompts: list[list[int]], guidance: float, **options: Any) -> list[torch.Tensor]:
    """Logits of every step, [rows per picture, pictures, codes]."""
    seen: list[torch.Tensor] = []

    def record(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.unflatten(0, (-1, len(prompts))).clone())
        return logits

    engine.generate(prompts, guidance=guidance, logits_processor=[record], **options)
    return seen


def check_company(dtype: torch.dtype, products: str, kv_heads: int) -> None:
    """That logits have the same bits in any company. Tokens hide most differences of rounding; these would show."""
    model = tiny.build_model(heads=4, kv_heads=kv_heads).to(dtype)
    prompts = prompts_of(tiny.image_inputs(many_prompts(11)))
    engine = Engine(model, plan_of_budget(model, 0.2), products=products, exact=True)
    for guidance in (2.0, 1.0):
        together = logits_of(engine, prompts, guidance, steps=24)
        for count in (1, 2, 5):
            alone = logits_of(engine, prompts[:count], guidance, steps=24)
            assert all(torch.equal(few, many[:, :count]) for few, many in zip(alone, together, strict=True))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype, products", [(torch.float32, "kernel"), (torch.float32, "torch"),
                                             (torch.bfloat16, "kernel"), (torch.float16, "kernel")], ids=str)
def test_logits_do_not_depend_on_company(dtype: torch.dtype, products: str, kv_heads: int) -> None:
    check_company(dtype, products, kv_heads)


@pytest.mark.parametrize("instruction_set", native.build_info().get("instruction_sets", [])[1:])
def test_logits_do_not_depend_on_company_with_other_instructions(instruction_set: str) -> None:
    with using(instruction_set):
        check_company(torch.bfloat16, "kernel", 2)


@pytest.mark.slow
def test_logits_do_not_depend_on_company_with_fewer_instructions_in_torch() -> None:
    """What torch's own libraries choose is chosen once per process."""
    code = "import torch, test_engine; test_engine.check_company(torch.float32, 'torch', 4)"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
                                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


def test_the_fused_weights_are_the_models_own(fresh: Any) -> None:
    size = sum(parameter.untyped_storage().nbytes() for parameter in fresh.parameters())
    prompts, greedy = prompts_of(tiny.image_inputs()), Sampling(greedy=True)
    engine = Engine(fresh)
    before = engine.generate(prompts, guidance=2.0, sampling=greedy)
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
                for parameter in fresh.parameters()}
    assert sum(storages.values()) == size
    with torch.no_grad():
        fresh.model.language_model.layers[0].self_attn.k_proj.weight.mul_(-1)
    changed = engine.generate(prompts, guidance=2.0, sampling=greedy)
    assert torch.equal(changed, tiny.draw(fresh)) and not torch.equal(changed, before)
    fresh.to(torch.float64).to(torch.float32)  # moves every weight
    with torch.no_grad():
        fresh.model.language_model.layers[0].self_attn.k_proj.weight.mul_(-1)
    assert torch.equal(engine.generate(prompts, guidance=2.0, sampling=greedy), before)


def test_a_model_that_drew_in_inference_mode_can_be_trained(fresh: Any) -> None:
    with torch.inference_mode():
        Engine(fresh).generate([[0, 7, 3]], steps=2)
    assert not any(parameter.is_inference() for parameter in fresh.parameters())
    fresh.train().model.language_model(input_ids=torch.tensor([[0, 7]]))[0].sum().backward()
    assert fresh.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_model_made_in_inference_mode_draws() -> None:
    with torch.inference_mode():
        model = tiny.build_model()
    expected, prompts = tiny.draw(tiny.build_model()), prompts_of(tiny.image_inputs())
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            drawn = Engine(model).generate(prompts, guidance=2.0, sampling=Sampling(greedy=True))
        assert torch.equal(drawn, expected)
    unfuse(model)
    assert torch.equal(tiny.draw(model), expected)


def test_weights_are_unfused(fresh: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no suitable name to keep"):
        Engine(fresh)
        save_model(fresh, tmp_path / "fused.safetensors")
    expected = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with torch.inference_mode():
        unfuse(fresh)
    save_model(fresh, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert len(loaded) == len(expected) - 1, "text embedding and text head are one"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    assert not any(parameter.is_inference() for parameter in fresh.parameters())


def test_biases_are_used() -> None:
    config = tiny.build_model().config
    config.text_config.attention_bias = config.text_config.mlp_bias = True
    torch.manual_seed(0)
    biased = type(tiny.build_model())(config).eval()
    stock = tiny.build_model()
    biased.load_state_dict(stock.state_dict(), strict=False)
    biased.generation_config = stock.generation_config
    with torch.no_grad():
        for name, parameter in biased.named_parameters():
            if "language_model" in name and name.endswith("bias"):
                parameter.normal_(std=0.5)
    expected = tiny.draw(biased)
    drawn = Engine(biased).generate(prompts_of(tiny.image_inputs()), guidance=2.0, sampling=Sampling(greedy=True))
    assert torch.equal(drawn, expected) and not torch.equal(drawn, tiny.draw(stock))


def first_logits(engine: Engine, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the first token, which does not depend on tokens drawn before it; no guidance."""
    seen: list[torch.Tensor] = []

    def record(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return logits

    engine.generate(prompts_of(inputs), guidance=1.0, steps=1, logits_processor=[record])
    return seen[0]


def test_bfloat16_is_close(fresh: Any) -> None:
    fresh.to(torch.bfloat16)
    inputs = tiny.image_inputs(tiny.PROMPTS[:1])

    def theirs() -> torch.Tensor:
        with torch.no_grad():
            hidden = fresh.model.language_model(**inputs, use_cache=False)[0][:, -1]
            return fresh.model.generation_head(hidden).float()

    expected, plain = theirs(), first_logits(Engine(fresh, products="torch"), inputs)
    assert (plain - expected).abs().max() < 0.05 * expected.abs().max()
    ours, exact = first_logits(Engine(fresh, products="kernel"), inputs), (fresh.float(), theirs())[1]
    assert (ours - exact).abs().max() < 2 * (expected - exact).abs().max() + 1e-5


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 20}], ids=str)
def test_products_of_the_kernel_and_of_torch_draw_transformers_tokens(model: Any, options: dict[str, Any],
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    assert Engine(model).products == "kernel"
    expected = tiny.draw(model, 3, **options)
    for kind in ("kernel", "torch"):
        for limit in (0, 10**6):  # codes in a table, and through the aligner at every step
            monkeypatch.setattr(weights, "TABLE_CODES", limit)
            torch.manual_seed(3)
            engine = Engine(model, products=kind)
            drawn = engine.generate(prompts_of(tiny.image_inputs()), guidance=2.0, seeds=None,
                                    sampling=Sampling.of(model, **options))
            assert torch.equal(drawn, expected)


def test_products_of_the_kernel_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs, weight, bias = torch.randn(5, 24), torch.randn(40, 24), torch.randn(40)
    for activation in (None, ACT2FN["silu"], ACT2FN["gelu"], torch.nn.SiLU(), torch.tanh):
        for gated in (False, True)[:1 + (activation is not None)]:
            for some_bias, norm in ((None, Norm(torch.randn(24), 1e-3)), (bias, None)):
                linear = Linear(weight, some_bias, norm, activation, gated)
                plus = torch.randn(5, 20 if gated else 40)
                for added in (None, plus):
                    torch.testing.assert_close(KernelLinear(linear, None)(inputs, added), linear(inputs, added))
    with monkeypatch.context() as patch:  # more rows than those few are torch's
        patch.setattr(products.Product, "__call__", lambda *given: pytest.fail("of the kernel"))
        torch.testing.assert_close(KernelLinear(linear, 4)(inputs), linear(inputs))


def test_many_rows_are_left_to_torch_where_amx_gains_and_bits_are_not_promised() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert most_rows(dtype, exact=True, amx=True) is most_rows(dtype, exact=False, amx=False) is None
    assert most_rows(torch.float32, exact=False, amx=True) is None
    assert most_rows(torch.bfloat16, exact=False, amx=True) == products.AMX_ROWS


def test_products_that_are_impossible_are_refused(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="products must be 'auto' or 'torch' here, got 'kernel': torch.compile"):
        Engine(fresh, products="kernel", compile=True)
    with pytest.raises(ValueError, match="products must be 'auto', 'kernel' or 'torch', got 'mkl'"):
        Engine(fresh, products="mkl")
    fresh.double()
    assert Engine(fresh).products == "torch"
    with pytest.raises(ValueError, match="products must be 'auto' or 'torch' here, got 'kernel': it needs dtype"):
        Engine(fresh, products="kernel")


def test_models_that_the_engine_cannot_run_are_named(fresh: Any) -> None:
    fresh.set_attn_implementation("eager")
    fresh.model.language_model(input_ids=torch.tensor([[0, 7]]), output_attentions=True, output_hidden_states=True)
    assert unsupported(fresh) is None
    handle = fresh.model.language_model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert "layers.1.mlp has hooks" in (unsupported(fresh) or "")
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in (unsupported(fresh) or "")
    fresh.model.language_model.layers[0].mlp.down_proj.half()
    with pytest.raises(ValueError, match="cannot run this model: its weights are not all on one device in one dtype"):
        Engine(fresh)
    fresh.float()
    fresh.model.language_model.layers[2].self_attn.q_proj = torch.nn.Identity()
    assert "layers.2.self_attn.q_proj is a Identity" in (unsupported(fresh) or "")
    fresh.model.generation_head = torch.nn.Sequential(fresh.model.generation_head)
    fresh.model.language_model.layers[2].self_attn.q_proj = torch.nn.Linear(128, 128)
    assert "generation_head is a Sequential, whose forward" in (unsupported(fresh) or "")


class OtherEmbedding(torch.nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return -super().forward(input)


class OtherNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return -super().forward(hidden_states)


@pytest.mark.parametrize("place, kind", [
    ("language_model.embed_tokens", OtherEmbedding), ("generation_embeddings", OtherEmbedding),
    ("language_model.norm", OtherNorm), ("language_model.layers.1.input_layernorm", OtherNorm),
    ("language_model.layers.2.post_attention_layernorm", OtherNorm)])
def test_replaced_modules_are_left_to_transformers(fresh: Any, place: str, kind: type) -> None:
    usual = tiny.draw(fresh)
    fresh.model.get_submodule(place).__class__ = kind
    expected = tiny.draw(fresh)
    assert unsupported(fresh) == f"{place} is a {kind.__name__}, whose forward the engine would not call"
    enable(fresh, plan_of_budget(fresh, 1))
    assert torch.equal(tiny.draw(fresh), expected) and not torch.equal(usual, expected)


@pytest.mark.parametrize("arguments, message", [
    ({"prompts": []}, "prompts must hold at least one prompt"),
    ({"prompts": [[]]}, r"prompts\[0\] must be 1 .. 60 tokens long, got 0"),
    ({"prompts": [[0] * 61]}, "got 61"),
    ({"prompts": [[0, 10**6]]}, r"prompts\[0\] must hold tokens within"),
    ({"guidance": [1.0, 2.0]}, "guidance must be one number or 1, got 2"),
    ({"guidance": float("nan")}, "guidance must be finite"),
    ({"seeds": [1, 2]}, "seeds must be one number or 1, got 2"),
    ({"seeds": 2**64}, "seeds must be within -2.63 .. 2.64 - 1, got 18446744073709551616"),
    ({"seeds": [-2**63 - 1]}, "seeds must be within -2.63 .. 2.64 - 1, got -9223372036854775809"),
    ({"steps": 0}, "steps must be within 1 .. 36"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
])
def test_bad_arguments(fresh: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(fresh).generate(**{"prompts": [[0, 7, 3]], **arguments})


def test_a_missing_token_is_named(fresh: Any) -> None:
    fresh.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=2)
    with pytest.raises(ValueError, match="must name a boi_token_id for guidance"):
        Engine(fresh).generate([[0, 7, 3]])
    assert Engine(fresh).generate([[0, 7, 3]], guidance=1, steps=2).shape == (1, 2)
