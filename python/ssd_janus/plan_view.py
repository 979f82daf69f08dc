"""What a plan gives each head, and why: as records, as a table and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.policies import KINDS, HeadProfile, head_costs, kind_of

from .extras import needs
from .files import write_atomically

# Letter and colour by rule. The colours differ in lightness too, so that they are apart in grey.
LOOKS = {"full": ("F", "#ffffff"), "window": ("W", "#f8e8a0"), "heavy position": ("P", "#f2b8a0"),
         "heavy mean": ("M", "#86b9e3"), "heavy decayed": ("D", "#66b28c"), "heavy sum": ("S", "#8a6ab2")}


def rule(spec: HeadSpec) -> str:
    """The kind of a head and, for a heavy one, its score rule: a key of `LOOKS`."""
    return f"heavy {spec.score}" if spec.kind == "heavy" else spec.kind


def rules(plan: CachePlan) -> dict[str, int]:
    """How many heads go by each rule, the most frequent first."""
    return dict(Counter(rule(spec) for heads in plan.layers for spec in heads).most_common())


def records(plan: CachePlan, profile: HeadProfile | None) -> list[dict[str, Any]]:
    """One JSON object per head, layer by layer.

    ``layer``, ``head`` and the fields of `HeadSpec.to_dict`; with a profile also

    - ``sparsity``: the head's score;
    - ``window_loss``: share of its visual attention that a window of its number of slots would miss;
    - ``cost``, ``window_cost``: predicted, as kept and as a window of as many slots, nats per token;
    - ``runner_up``: the ``kind`` of `policies.KINDS`, other than the head's own, that is predicted to cost least with
      as many slots, and its ``cost``; None for a head that keeps everything.

    Args:
        plan: L layers x H KV heads.
        profile: of a model of L layers x H KV heads, or None.

    Raises:
        ValueError: the profile has other layers or heads.
    """
    found = [{"layer": layer, "head": head, **spec.to_dict()}
             for layer, heads in enumerate(plan.layers) for head, spec in enumerate(heads)]
    if profile is None:
        return found
    own = head_costs(plan, profile)
    others = {kind: head_costs(_all_of_kind(plan, kind), profile) for kind in profile.kinds}
    for record in found:
        at = record["layer"], record["head"]
        spec = plan.layers[at[0]][at[1]]
        record.update(
            sparsity=float(profile.sparsity[at]),
            # A sum of shares may miss 1 by a rounding error.
            window_loss=0.0 if spec.size is None else max(0.0, float(profile.window_loss(spec.size)[at])),
            cost=float(own[at]), window_cost=float(others["window"][at]), runner_up=None)
        if spec.size is not None:
            cost, kind = min((float(costs[at]), kind) for kind, costs in others.items()
                             if kind != kind_of(spec, profile))
            record["runner_up"] = {"kind": kind, "cost": cost}
    return found


def _all_of_kind(plan: CachePlan, kind: str) -> CachePlan:
    """The plan with as many slots per head, all heads of one kind of `policies.KINDS`."""
    return CachePlan([[spec if spec.size is None else KINDS[kind](spec.size) for spec in heads]
                      for heads in plan.layers], plan.row_buffer, plan.keep_prompt, plan.kv_format)


def table(plan: CachePlan, heads: Sequence[Mapping[str, Any]]) -> Table:
    """A table to print, a line per head of ``plan``; ``heads`` are its `records`. Costs in 1e-6 nats per token."""
    explained = "cost" in heads[0]
    reasons = (("sparsity", "window\nmisses", "cost\n1e-6 nats", "as a\nwindow", "runner-up\nat as many slots")
               if explained else ())
    shown = Table(box=None, pad_edge=False)
    for name in ("layer", "head", "keeps", "slots", "recent", "pinned", *reasons):
        shown.add_column(name, justify="left" if name in ("keeps", "runner-up") else "right", no_wrap=True)
    for head in heads:
        spec = plan.layers[head["layer"]][head["head"]]
        cells = [str(head["layer"]), str(head["head"]), rule(spec), "all" if spec.size is None else str(spec.size),
                 str(spec.recent or ""), str(len(spec.pinned) or "")]
        if explained:
            other = head["runner_up"]
            cells += [f"{head['sparsity']:.2f}", f"{head['window_loss']:.1%}", _millionths(head["cost"]),
                      _millionths(head["window_cost"]),
                      f"{_millionths(other['cost'])} {other['kind']}" if other else ""]
        shown.add_row(*cells)
    return shown


def _millionths(cost: float) -> str:
    return f"{1e6 * cost:.2f}"


def save_picture(plan: CachePlan, file: Path, title: str) -> None:
    """Draw a map of layers x heads as PNG: colour and letter say by which rule a head keeps tokens, numbers how many.

    Args:
        plan: of any size.
        file: to write.
        title: above the map.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    with needs("plot", "matplotlib"):
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    figure = Figure(figsize=(max(6.0, 1.2 + 0.65 * plan.num_heads), 2.2 + 0.4 * plan.num_layers), layout="constrained")
    axes = figure.subplots()
    for layer, heads in enumerate(plan.layers):
        for head, spec in enumerate(heads):
            letter, color = LOOKS[rule(spec)]
            axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, facecolor=color, edgecolor="black"))
            axes.text(head, layer, letter if spec.size is None else f"{letter} {spec.size}", ha="center", va="center",
                      fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="KV head", ylabel="layer", xlim=(-0.5, plan.num_heads - 0.5),
             ylim=(plan.num_layers - 0.5, -0.5), xticks=range(plan.num_heads), yticks=range(plan.num_layers))
    figure.legend(handles=[Patch(facecolor=LOOKS[name][1], edgecolor="black",
                                 label=f"{LOOKS[name][0]}: {name} ({count} heads)")
                           for name, count in rules(plan).items()], loc="outside lower center", ncols=2, fontsize=9)
    write_atomically(file, lambda out: figure.savefig(out, format="png", dpi=110))
