"""The command ``plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ssd_attach.units import show_bytes

from .options import (
    DEFAULT_BUDGET,
    BudgetBytes,
    Dtype,
    Kv,
    Model,
    Parameters,
    PolicyName,
    ProfileFile,
    RowBuffer,
    check_budgets,
    choose_plan,
    default_budget,
    load,
    load_profile,
    policy_parameters,
)
from .terminal import console, messages, print_table

PROMPT = 64  # tokens, of the picture whose bytes are shown


def plan(
    policy: Annotated[PolicyName, typer.Option(help="The rule to make a plan by.")],
    budget: Annotated[float | None, typer.Option(help="Share of the picture's tokens that the policy may keep, row "
                                                      f"buffer included. Default: {DEFAULT_BUDGET}; 1 for "
                                                      "full.")] = None,
    budget_bytes: BudgetBytes = None,
    kv: Kv = None,
    row_buffer: RowBuffer = None,
    parameter: Parameters = None,
    model: Model = None,
    profile: ProfileFile = None,
    dtype: Dtype = None,
    out: Annotated[Path | None, typer.Option(help="Also save the plan into this file, for `generate --plan`.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw a map of layers and heads into this PNG file (needs "
                                                      "matplotlib).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a policy gives each head, and why as far as a profile tells; draws nothing."""
    if policy is PolicyName.online:
        names = ", ".join(name for name in PolicyName.__members__ if name != "online")
        raise ValueError(f"--policy must be one of {names}, got online, which decides while a picture is drawn")
    parameters = policy_parameters(policy, parameter)
    check_budgets(budget, budget_bytes, [kv])
    asked = default_budget(policy) if budget is None and budget_bytes is None else budget
    pipe = load(model, "cpu", dtype, "auto")
    known = load_profile(profile, model, [policy], pipe, formats=[kv], anyway=True)
    if known is not None:
        known.check(pipe.shape)
    chosen = choose_plan(pipe, None, policy, asked, row_buffer, known, parameters, budget_bytes=budget_bytes, kv=kv)
    from .. import plan_view

    heads = plan_view.records(chosen, known)
    tokens = pipe.shape.num_visual_tokens
    size, full = (each.nbytes(batch_size=2, head_dim=pipe.shape.head_dim, max_prompt=PROMPT, dtype=pipe.dtype,
                              num_visual_tokens=tokens) for each in (chosen, pipe.shape.full_plan()))
    facts: dict[str, Any] = {
        "policy": policy.value, "parameters": parameters, "kv_format": chosen.kv_format, "budget": asked,
        "budget_reached": chosen.budget(tokens), "byte_budget": budget_bytes,
        "byte_budget_reached": chosen.byte_budget(tokens, head_dim=pipe.shape.head_dim, dtype=pipe.dtype),
        "row_buffer": chosen.row_buffer, "dtype": str(pipe.dtype).removeprefix("torch."), "prompt_tokens": PROMPT,
        "cache_bytes": size, "full_cache_bytes": full,
        "predicted_cost": None if known is None else sum(head["cost"] for head in heads),
        "rules": plan_view.rules(chosen), "heads": heads}
    for file in (out, picture):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if out is not None:
        chosen.save(out)
    if picture is not None:
        plan_view.save_picture(chosen, picture, _title(facts).replace(": ", ":\n"))
    if as_json:
        print(json.dumps(facts))
    else:
        console.print(_summary(facts), soft_wrap=True)
        print_table(plan_view.table(chosen, heads))
    if known is None:
        messages.print("no profile of this model, so no reasons: measure one with `ssd-janus profile`", soft_wrap=True)


def _title(facts: dict[str, Any]) -> str:
    own = "".join(f", {name}={value}" for name, value in facts["parameters"].items())
    own += "" if facts["kv_format"] == "auto" else f", {facts['kv_format']}"
    reached = f"{facts['budget_reached']:.2%}"
    asked = f"budget {facts['budget']:.1%} asked, {reached} reached" if facts["byte_budget"] is None else (
        f"{facts['byte_budget']:.1%} of the bytes asked, {facts['byte_budget_reached']:.2%} reached, with {reached} of "
        "the tokens")
    return f"{facts['policy']}{own}: {asked}, row buffer {facts['row_buffer']}"


def _summary(facts: dict[str, Any]) -> str:
    cost = "" if facts["predicted_cost"] is None else f"; predicted cost {facts['predicted_cost']:.6f} nats per token"
    heads = ", ".join(f"{count} {name}" for name, count in facts["rules"].items())
    kept, of = (facts["dtype"], "") if facts["kv_format"] == "auto" else (facts["kv_format"], f" in {facts['dtype']}")
    return (f"{_title(facts)}; {show_bytes(facts['cache_bytes'])} for a guided picture in {kept}, "
            f"{facts['cache_bytes'] / facts['full_cache_bytes']:.1%} of the full cache's "
            f"{show_bytes(facts['full_cache_bytes'])}{of}{cost}; heads: {heads}")
