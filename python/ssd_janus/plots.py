"""Plots of head profiles and of results against the budget; need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssd_kernels.policies import HeadProfile

from .extras import needs
from .files import write_atomically

if TYPE_CHECKING:
    from .evaluation.fidelity import Fidelity
    from .evaluation.quality import Quality


def save_all(profile: HeadProfile, out: Path, tau: float | None = None) -> list[Path]:
    """Write every plot as PNG into ``out``; returns the files.

    - ``heads.png``: sparsity score of every head, with the heads above tau marked;
    - ``attention.png``: what the four most and the four least sparse heads look at, around the token they write;
    - ``columns.png``: attention by column and the guidance difference by position, where margins would stand out;
    - ``kinds.png``: share of semantic heads as tau moves, and what windows of several lengths miss.

    Args:
        profile: of a model.
        out: folder, which must exist.
        tau: of SSD's rule; None for the median score.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    with needs("plot", "matplotlib"):
        from matplotlib.figure import Figure
    threshold = float(profile.sparsity.median()) if tau is None else tau
    files = []
    for name, draw, size in (("heads", _heads, (7, 6)), ("attention", _attention, (11, 5)),
                             ("columns", _columns, (11, 4)), ("kinds", _kinds, (11, 4))):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, profile, threshold)
        files.append(out / f"{name}.png")
        write_atomically(files[-1], lambda file: figure.savefig(file, format="png", dpi=110))  # noqa: B023
    return files


def _heads(figure: Any, profile: HeadProfile, tau: float) -> None:
    axes = figure.subplots()
    image = axes.imshow(profile.sparsity, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for layer, head in (profile.sparsity > tau).nonzero().tolist():
        axes.plot(head, layer, "x", color="tab:red", markersize=5)
    axes.set(title=f"sparsity score; x: semantic (above tau = {tau:.2f})", xlabel="KV head", ylabel="layer")
    figure.colorbar(image, label="share of visual attention outside the neighbourhood").ax.axhline(tau, color="tab:red")


def _attention(figure: Any, profile: HeadProfile, tau: float) -> None:
    order = profile.sparsity.flatten().argsort().tolist()
    chosen, columns = [*order[:4], *order[-4:]], profile.columns
    shown = min(9, profile.offset_mass.shape[2])
    for axes, index in zip(figure.subplots(2, 4).flat, chosen, strict=True):
        layer, head = divmod(index, profile.num_heads)
        mass = profile.offset_mass[layer, head, :shown].flip(0)  # upwards is up
        axes.imshow(mass.clamp_min(1e-5).log10(), cmap="Greys", vmin=-4, vmax=0, aspect="auto",
                    extent=(-columns + 0.5, columns - 0.5, -0.5, shown - 0.5))
        axes.set_title(f"layer {layer} head {head}: {profile.sparsity[layer, head]:.2f}", fontsize=9)
    figure.supxlabel("columns aside")
    figure.supylabel("rows up")
    figure.suptitle("share of visual attention by relative place, white 0.0001 .. black 1", fontsize=10)


def _columns(figure: Any, profile: HeadProfile, tau: float) -> None:
    left, right = figure.subplots(1, 2)
    semantic = profile.sparsity > tau
    for mask, label, style in ((semantic, "semantic heads", "-"), (~semantic, "spatial heads", "--")):
        if mask.any():
            left.plot(profile.column_mass[mask].mean(0), style, color="black", label=label)
    left.axhline(1 / profile.columns, color="grey", linewidth=0.8, label="even")
    left.set(xlabel="column of the attended token", ylabel="share of visual attention", ylim=(0, None))
    left.legend()
    right.plot(profile.guidance_difference.mean(0), color="black", linewidth=0.8)
    for margin in range(profile.columns - 1, profile.num_visual_tokens, profile.columns):
        right.axvline(margin, color="grey", linewidth=0.3)
    right.set(xlabel="visual token (lines: last column)", ylabel="squared difference per channel",
              title="keys and values with and without the prompt", ylim=(0, None))


def _kinds(figure: Any, profile: HeadProfile, tau: float) -> None:
    left, right = figure.subplots(1, 2)
    grid = torch.linspace(0, 1, 101)
    left.plot(grid, [float((profile.sparsity > value).float().mean()) for value in grid], color="black")
    left.axvline(tau, color="tab:red", label=f"tau = {tau:.2f}")
    left.set(xlabel="tau", ylabel="share of heads that are semantic", ylim=(0, 1))
    left.legend()
    for rows, style in ((1, ":"), (2, "-"), (4, "--"), (8, "-.")):
        loss = profile.window_loss(rows * profile.columns).flatten().sort().values
        right.plot(torch.linspace(0, 1, len(loss)), loss, style, color="black", label=f"{rows} rows")
    right.set(xlabel="share of heads", ylabel="visual attention that a window misses", ylim=(0, 1))
    right.legend()


def save_curves(results: Mapping[str, Quality | Fidelity], file: Path) -> None:
    """Plot results against the budget, one line per policy, as PNG.

    Quality: overall score with its 95% interval. Fidelity: mean KL, on a logarithmic scale, without plans that equal
    the full cache.

    Args:
        results: by plan name, ``POLICY-BUDGET``; a name without a budget is a point of its own.
        file: to write.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    from .evaluation.quality import Quality

    with needs("plot", "matplotlib"):
        from matplotlib.figure import Figure
    lines: dict[str, list[Quality | Fidelity]] = {}
    for name, result in results.items():
        lines.setdefault(name.rpartition("-")[0] or name, []).append(result)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, found) in enumerate(lines.items()):
        found.sort(key=lambda result: result.budget)
        style: dict[str, Any] = {"label": name, "marker": "osv^Dx*P<>"[number % 10], "markersize": 5,
                                 "linestyle": ("-", "--", "-.", ":")[number % 4]}
        scores = [result.overall for result in found if isinstance(result, Quality)]
        if scores:
            means = [score.mean for score in scores]
            axes.errorbar([result.budget for result in found], means, capsize=2, **style,
                          yerr=[[score.mean - score.low for score in scores],
                                [score.high - score.mean for score in scores]])
        else:
            points = [(result.budget, result.kl_mean) for result in found
                      if not isinstance(result, Quality) and result.kl_mean > 0]
            if points:
                axes.plot(*zip(*points, strict=True), **style)
                axes.set_yscale("log")
    axes.set(xlabel="budget (share of the visual tokens, row buffer included)", xlim=(0, None),
             ylabel="overall score" if isinstance(next(iter(results.values())), Quality)
             else "KL to the full cache, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(file, lambda out: figure.savefig(out, format="png", dpi=110))
