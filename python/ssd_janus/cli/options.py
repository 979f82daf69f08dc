"""Options that several commands have, and what they ask for: plans, profiles, a loaded model."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssd_attach.units import show_bytes

from ..ranks import ALONE, Ranks
from .terminal import messages, say

if TYPE_CHECKING:
    from ssd_kernels import CachePlan
    from ssd_kernels.policies import HeadProfile

    from ..pipeline import Pipeline, RunStats

DEFAULT_BUDGET = 0.2
SAMPLING = ("temperature", "top_k", "top_p")


class PolicyName(str, Enum):
    """The policies of `ssd_kernels.policies`, written down here so that ``--help`` need not import torch."""

    full = "full"
    window = "window"
    heavy = "heavy"
    decayed = "decayed"
    streaming_llm = "streaming_llm"
    h2o = "h2o"
    rows = "rows"
    random = "random"
    ssd = "ssd"
    ssd_guarded = "ssd_guarded"
    margin = "margin"
    adaptive = "adaptive"
    online = "online"


class LayoutName(str, Enum):
    geneval = "geneval"
    dpg = "dpg"
    parquet = "parquet"


class FormatName(str, Enum):
    """The formats of `ssd_kernels.kv_format`, and `ssd_kernels.policies.BEST`."""

    auto = "auto"
    int8 = "int8"
    best = "best"


class WeightsName(str, Enum):
    """`ssd_janus.quantization.FORMATS`."""

    int8 = "int8"


class DtypeName(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Of weights and caches. Default: float32 on a CPU, else the "
                                                      "checkpoint's.")]
Weights = Annotated[WeightsName | None, typer.Option(help=(
    "Quantize the weights of the language model's layers by torchao, the extra [quantize]: int8 takes half the memory "
    "of bfloat16. On a CPU it draws many times slower. Default: as they are."))]
Backend = Annotated[str, typer.Option(help="Who computes the steps: auto, or a backend that `info` lists.")]
Model = Annotated[str | None, typer.Option(help="Folder or hub id of a Janus checkpoint, such as deepseek-community/"
                                                "Janus-Pro-1B. Default: the included model.")]
PROMPTS_FILE = ("Read the prompts from a file: one per line, .jsonl with a \"prompt\" in every line (as GenEval's), "
                ".csv with item_id and text, or a folder of .txt files (as DPG-Bench's).")
PromptsFile = Annotated[Path | None, typer.Option(help=PROMPTS_FILE)]
RowBuffer = Annotated[int | None, typer.Option(min=0, help="Steps between evictions of the policy; 0 evicts at every "
                                                           "step. Default: one grid row.")]
ProfileFile = Annotated[Path | None, typer.Option(
    "--profile", help="What `profile` measured about the model's heads, for the policies ssd, ssd_guarded, margin and "
                      "adaptive. Default: the included model's own.")]
Parameters = Annotated[list[str] | None, typer.Option(
    "--parameter", metavar="NAME=VALUE", help="A parameter of the policy's own, such as tau=0.5; may be repeated.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first picture; the next ones count on. The same prompt, "
                                               "plan and seed repeat a picture, whatever is drawn beside it.")]
Guidance = Annotated[float | None, typer.Option(help="Strength of classifier-free guidance; 1 turns it off. Default: "
                                                     "the model's own.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="Of sampling; 0 takes the likeliest token. Default: the "
                                                               "model's own.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="Draw from so many likeliest tokens; 0 from all. "
                                                                 "Default: the model's own, transformers' is 50.")]
TopP = Annotated[float | None, typer.Option("--top-p", min=0, max=1, help=(
    "Draw from the likeliest tokens of this share; 1 from all. Default: the model's own."))]
On = Annotated[str | None, typer.Option("--on", metavar="PLACE", help=(
    "Draw on a Ray cluster: ray starts one on this machine, ray://auto or ray://HOST:PORT join one that this machine "
    "is a node of. There is a worker for every GPU, or with --device cpu for every two cores."))]
Workers = Annotated[int | None, typer.Option(min=1, help=(
    "With --on: as many workers, also where the cluster has yet to grow to them. Default: as many as fit."))]
Plans = Annotated[list[Path] | None, typer.Option("--plan", help="Plan file; may be repeated.")]
PlanFile = Annotated[Path | None, typer.Option(help="Plan file: what each head keeps.")]
Policy = Annotated[PolicyName | None, typer.Option(
    help="Make a plan by this rule. Default: full, nothing is evicted.")]
Budget = Annotated[float | None, typer.Option(
    help=f"Share of the picture's tokens that the policy may keep, row buffer included. Default: {DEFAULT_BUDGET}.")]
Policies = Annotated[list[PolicyName] | None, typer.Option(
    "--policy", help="Make a plan by this rule; may be repeated. Default without --plan: full.")]
Budgets = Annotated[list[float] | None, typer.Option(
    "--budget", help=f"Share of the picture's tokens that each policy may keep; may be repeated. Default: "
                     f"{DEFAULT_BUDGET}.")]


KV = ("How caches store keys and values: auto, in the model's dtype; int8, as signed bytes with a scale per token and "
      "head; best, with --budget-bytes, whichever a profile predicts to lose less.")
Kv = Annotated[FormatName | None, typer.Option("--kv", help=f"{KV} Default: auto.")]
Kvs = Annotated[list[FormatName] | None, typer.Option("--kv", help=f"{KV} May be repeated. Default: auto.")]
BUDGET_BYTES = "In place of --budget: share of the bytes that a full cache takes for the picture's tokens."
BudgetBytes = Annotated[float | None, typer.Option("--budget-bytes", help=BUDGET_BYTES)]
BudgetsBytes = Annotated[list[float] | None, typer.Option("--budget-bytes", help=f"{BUDGET_BYTES} May be repeated.")]


def check_plan_options(plan: Path | None, policy: PolicyName | None, budget: float | None, budget_bytes: float | None,
                       row_buffer: int | None, parameters: Sequence[str] | None, kv: FormatName | None) -> None:
    """Refuse combinations before the model is loaded."""
    of_policies = [name for name, value in (("--budget", budget), ("--budget-bytes", budget_bytes),
                                            ("--row-buffer", row_buffer), ("--parameter", parameters or None))
                   if value is not None]
    given = [*(["--policy"] if policy else []), *of_policies, *(["--kv"] if kv else [])]
    if plan is not None and given:
        raise ValueError(f"--plan already says what to keep and cannot be combined with {', '.join(given)}")
    if policy is None and of_policies:
        raise ValueError(f"{', '.join(of_policies)} needs --policy, one of {', '.join(PolicyName.__members__)}")
    check_budgets(budget, budget_bytes, [kv])


def check_plans_options(plans: Sequence[Path] | None, policies: Sequence[PolicyName] | None,
                        budgets: Sequence[float] | None, budgets_bytes: Sequence[float] | None, row_buffer: int | None,
                        profile: Path | None, formats: Sequence[FormatName] | None) -> None:
    """As `check_plan_options`, for options that may be repeated, where plans may stand beside policies."""
    given = {"--budget": budgets or None, "--budget-bytes": budgets_bytes or None, "--row-buffer": row_buffer,
             "--profile": profile, **({"--kv": formats or None} if plans else {})}
    for option, value in given.items():
        if value is not None and not policies:
            raise ValueError(f"{option} says nothing without --policy")
    check_budgets(budgets or None, budgets_bytes or None, formats or [])


def check_budgets(budget: object, budget_bytes: object, formats: Sequence[FormatName | None]) -> None:
    """Refuse budgets in both units, and the best format without one in bytes."""
    if budget is not None and budget_bytes is not None:
        raise ValueError("--budget and --budget-bytes cannot be combined: both say how much is kept")
    if FormatName.best in formats and budget_bytes is None:
        raise ValueError("--kv best needs --budget-bytes: at as many tokens auto always loses least")


def policy_parameters(policy: PolicyName | None, given: Sequence[str] | None) -> dict[str, float | str]:
    """Keyword arguments of the policy's own from NAME=VALUE texts; a VALUE that is no JSON number is a text.

    Raises:
        ValueError: not NAME=VALUE, a name that the policy does not have or that is given twice, a text for a number
            or a number for a text.
    """
    if policy is None or not given:
        return {}
    from ssd_attach.choice import parameters_of

    defaults = parameters_of(policy.value)
    found: dict[str, float | str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--parameter must be NAME=VALUE, got {text!r}")
        if name not in defaults:
            allowed = f"must be one of {', '.join(defaults)}" if defaults else "cannot be given, it has none"
            raise ValueError(f"--parameter of policy {policy.value} {allowed}, got {name!r}")
        if name in found:
            raise ValueError(f"--parameter {name} must be given once, got it twice")
        found[name] = _number_or_text(value)
        if isinstance(found[name], str) != isinstance(defaults[name], str):
            wanted = "a word" if isinstance(defaults[name], str) else "a number such as 1 or 0.5"
            raise ValueError(f"--parameter {name} must be {wanted}, got {value!r}")
    return found


def _number_or_text(value: str) -> float | str:
    try:
        number = json.loads(value, parse_constant=str)
    except ValueError:
        return value
    return number if type(number) in (int, float) else value


def default_budget(policy: PolicyName) -> float:
    """The budget of a policy for which none is given."""
    return 1.0 if policy is PolicyName.full else DEFAULT_BUDGET


def choose_plan(pipe: Pipeline, plan: Path | None, policy: PolicyName | None, budget: float | None,
                row_buffer: int | None, profile: HeadProfile | None, parameters: Mapping[str, Any] | None = None, *,
                budget_bytes: float | None = None, kv: FormatName | None = None) -> CachePlan:
    """One plan from the options of `generate`; ``parameters`` are those of `policy_parameters`."""
    from ssd_attach.choice import make_plan
    from ssd_kernels import CachePlan

    if plan is not None:
        from ssd_kernels.reading import naming

        loaded = CachePlan.load(plan)
        with naming(plan):
            return pipe.shape.check(loaded)
    name = PolicyName.full if policy is None else policy
    if budget is None and budget_bytes is None:
        budget = default_budget(name)
    return make_plan(name.value, pipe.shape, budget, row_buffer, byte_budget=budget_bytes, dtype=pipe.dtype,
                     kv_format=(kv or FormatName.auto).value, profile=profile, **(parameters or {}))


def choose_plans(pipe: Pipeline, files: Sequence[Path], policies: Sequence[PolicyName], budgets: Sequence[float],
                 row_buffer: int | None, profile: HeadProfile | None, *, in_bytes: bool = False,
                 formats: Sequence[FormatName] = ()) -> dict[str, CachePlan]:
    """Named plans from repeated options: every file, and every policy at every budget in every format, the full plan
    only in every format; the full plan if neither files nor policies are given."""
    plans = {}
    for file in files:
        if not file.stem.strip("."):
            raise ValueError(f"--plan must be a file with a name of its own, got {file}")
        if file.stem in plans:
            raise ValueError(f"--plan files must have different names, got {file.stem} twice")
        plans[file.stem] = choose_plan(pipe, file, None, None, None, None)
    for policy in dict.fromkeys(policies if files or policies else [PolicyName.full]):
        for budget in [None] if policy is PolicyName.full else dict.fromkeys(budgets or [DEFAULT_BUDGET]):
            for kv in dict.fromkeys(formats or [FormatName.auto]):
                name = policy.value if budget is None else f"{policy.value}-{budget:g}{'-bytes' if in_bytes else ''}"
                name += "" if kv is FormatName.auto else f"-{kv.value}"
                if name in plans:
                    raise ValueError(f"--plan must not be a file named like a policy's plan, got {name}.json")
                if budget is None and kv is FormatName.best:
                    raise ValueError(f"--kv {kv.value} says nothing about policy full, which keeps every token; name "
                                     "auto or int8")
                tokens, share = (None, budget) if in_bytes else (budget, None)
                plans[name] = choose_plan(pipe, None, policy, tokens, row_buffer, profile, budget_bytes=share, kv=kv)
    return plans


def load_profile(file: Path | None, model: str | None, policies: Sequence[PolicyName], pipe: Pipeline, *,
                 formats: Sequence[FormatName | None] = (), anyway: bool = False) -> HeadProfile | None:
    """The profile that these policies, or the choice of the best of ``formats``, need, if any does: the given one, or
    the included model's own.

    With ``anyway`` also where none of them needs it, if there is one.

    Warns if it was measured on other weights than the pipeline's; a profile without a fingerprint cannot tell.
    """
    from ssd_kernels.policies import NEED_PROFILE, HeadProfile

    from ..checkpoints import fingerprint, included_profile

    needed = bool(NEED_PROFILE.intersection(policy.value for policy in policies)) or FormatName.best in formats
    if file is None and model is None and (needed or anyway):
        with nullcontext() if needed else suppress(FileNotFoundError):
            file = included_profile()
    if file is None:
        return None
    profile = HeadProfile.load(file)
    if (measured := profile.meta.get("weights")) is not None and measured != (own := fingerprint(pipe.model)):
        warnings.warn(f"ssd_kernels: {file} was measured on other weights ({measured}, the model has {own}) and may "
                      "suit this model badly; measure its own with `ssd-janus profile`", stacklevel=2)
    return profile


def load_here(model: str | None, device: str, dtype: DtypeName | None, sampling: Mapping[str, Any],
              weights: WeightsName | None) -> Pipeline:
    """The model as workers elsewhere load it for ``device``, but on the CPU of this process, which draws nothing."""
    return load(model, "cpu", dtype, "auto", sampling=sampling, weights=weights, own_dtype=device != "cpu")


def load(model: str | None, device: str, dtype: DtypeName | None, backend: str, ranks: Ranks = ALONE, *,
         sampling: Mapping[str, Any] | None = None, weights: WeightsName | None = None,
         own_dtype: bool = False) -> Pipeline:
    """The model; with several processes on one machine, on the GPU of this one.

    Args:
        sampling: temperature, top_k and top_p, None for the model's own.
        weights: a format to quantize weights to, None for none.
        own_dtype: without ``dtype`` in the checkpoint's, also on a CPU.
    """
    _quiet(local=model is None or Path(model).is_dir())
    with messages.status("loading the model") if ranks.alone else nullcontext():
        import torch

        from ..engine import set_sampling
        from ..pipeline import Pipeline

        kind = getattr(torch, dtype.value) if dtype else "auto" if own_dtype else None
        try:
            pipe = Pipeline.from_pretrained(model, device=ranks.device(device, torch.cuda.device_count()), dtype=kind,
                                            backend=backend)
            set_sampling(pipe.model, **(sampling or {}))
            if weights is not None:
                from ..quantization import quantize

                quantize(pipe.model, weights.value)
            return pipe
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            # Only what is downloaded is written without saying where.
            from huggingface_hub.constants import HF_HUB_CACHE

            raise OSError(error.errno, error.strerror, HF_HUB_CACHE) from error


def _quiet(local: bool) -> None:
    """Keep libraries from talking over the output and, for local checkpoints, from asking the network."""
    if local:
        # Read once, when huggingface_hub is imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", message="ssd_kernels")
    warnings.showwarning = lambda message, *_: say(str(message))
    logging.getLogger("torch").setLevel(logging.ERROR)
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if local:
        transformers_logging.disable_progress_bar()


def last_run(pipe: Pipeline) -> RunStats:
    if pipe.last_run is None:
        raise RuntimeError("the pipeline has drawn nothing")
    return pipe.last_run


def together(runs: Sequence[RunStats]) -> RunStats:
    """Several runs as one; memory is that of the run that took most."""
    return replace(max(runs, key=lambda run: run.cache_bytes), pictures=sum(run.pictures for run in runs),
                   seconds=sum(run.seconds for run in runs), decode_seconds=sum(run.decode_seconds for run in runs))


def summary(run: RunStats) -> str:
    return (f"{run.pictures} pictures in {run.seconds + run.decode_seconds:.1f} s "
            f"({run.pictures_per_second:.2f} pictures/s, backend {run.backend}); cache {show_bytes(run.cache_bytes)}, "
            f"{run.cache_bytes / run.full_cache_bytes:.0%} of the full cache's {show_bytes(run.full_cache_bytes)}")
