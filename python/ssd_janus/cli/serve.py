"""The command ``serve``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..extras import needs
from .options import (
    Backend,
    Budget,
    BudgetBytes,
    Device,
    Dtype,
    Guidance,
    Kv,
    Model,
    Parameters,
    PlanFile,
    Policy,
    ProfileFile,
    RowBuffer,
    check_plan_options,
    choose_plan,
    load,
    load_profile,
    policy_parameters,
)
from .terminal import messages, say

if TYPE_CHECKING:
    from ..serve.server import Server

INCLUDED = "ssd-shapes"  # what clients call the included model by


def serve(
    host: Annotated[str, typer.Option(help="Name or address to listen on. The default only this machine "
                                           "reaches.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key: Annotated[str | None, typer.Option(
        envvar="SSD_JANUS_API_KEY", show_envvar=True, help="Without which nobody draws. Other users of this machine "
                                                           "may see options, but not the environment.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model by. Default: the hub id, or the "
                                                  f"folder's name; {INCLUDED} is the included one.")] = None,
    model: Model = None,
    plan: PlanFile = None,
    policy: Policy = None,
    budget: Budget = None,
    budget_bytes: BudgetBytes = None,
    kv: Kv = None,
    row_buffer: RowBuffer = None,
    parameter: Parameters = None,
    profile: ProfileFile = None,
    any_plan: Annotated[bool, typer.Option("--any-plan", help="Let requests name policies on a GPU, too. Its steps are "
                                                              "then not captured. On a CPU they always may.")] = False,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Most pictures drawn at once.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=1, help="Most pictures that wait; more are refused.")] = 256,
    max_images: Annotated[int, typer.Option(min=1, help="Most pictures of one request.")] = 10,
    max_prompt: Annotated[int, typer.Option(min=1, help="Most characters of a prompt.")] = 4000,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 64 << 10,
    keep_seconds: Annotated[int, typer.Option(min=1, help="How long pictures are kept under a URL.")] = 3600,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that pictures have after SIGTERM or SIGINT.")] = 30.0,
) -> None:
    """Draw for programs that know OpenAI's image API, and on a page for browsers, until SIGTERM or SIGINT."""
    check_plan_options(plan, policy, budget, budget_bytes, row_buffer, parameter, kv)
    parameters = policy_parameters(policy, parameter)
    if api_key is not None and not api_key.strip():
        raise ValueError("--api-key, or SSD_JANUS_API_KEY, must not be blank")
    with needs("serve", "fastapi", "uvicorn", "prometheus_client"):
        from ..serve.server import Server
        from ..serve.service import Limits, Service
    limits = Limits(batch=batch_size, waiting=max_waiting, images=max_images, prompt=max_prompt, body=max_body,
                    kept_seconds=keep_seconds)
    pipe = load(model, device, dtype, backend)
    heads = load_profile(profile, model, [policy] if policy else [], pipe, formats=[kv], anyway=True)
    cache_plan = choose_plan(pipe, plan, policy, budget, row_buffer, heads, parameters,
                             budget_bytes=budget_bytes, kv=kv)
    service = Service(pipe, cache_plan, name=name or _name(model), limits=limits, guidance_scale=guidance,
                      profile=heads, any_plan=any_plan)
    server = Server(service, host, port, api_key)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end in order; a second one at once
    try:
        messages.print(f"drawing {service.name}, {service.size}, at {server.url}", soft_wrap=True)
        if api_key is None and not server.loopback:
            say("whoever reaches this address can draw: --api-key or SSD_JANUS_API_KEY keeps others out")
        server.wait()
        raise RuntimeError("the server has ended by itself")
    except KeyboardInterrupt:
        load_now = service.scheduler.load
        left = load_now.waiting + load_now.joining + load_now.running
        messages.print(f"ending: {left} pictures have {grace:g} s; again ends at once")
        _stop(server, grace)


def _stop(server: Server, grace: float) -> None:
    """End in order, or at once if there is another signal."""
    try:
        server.stop(grace)
        code, left = 0, not server.service.scheduler.close(timeout=0)
    except KeyboardInterrupt:
        code, left = 128 + signal.SIGINT, True
        messages.print("stopped")
    if left:  # a thread within a step, which would abort the process when the interpreter ends
        sys.stderr.flush()
        os._exit(code)


def _name(model: str | None) -> str:
    if model is None:
        return INCLUDED
    return Path(model).resolve().name if Path(model).is_dir() else model
