"""Plots of head profiles and of results against the budget; need matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ssd_kernels.policies import HeadProfile

from .extras import needs
from .files import write_atomically

if TYPE_CHECKING:
    from .evaluation.fidelity import Fidelity
    from .evaluation.quality import Quality


def save_all(profile: HeadProfile, out: Path, tau: float | None = None) -> list[Path]:
    """Write every plot as PNG into ``out``; returns the files.

    - ``heads.png``: sparsity score of every head, with the heads above tau marked;
    - ``attention.png``: what the four least and the four most sparse heads look at, around the token they write and
      on the grid from a few tokens;
    - ``columns.png``: attention by column and the guidance difference by position, where margins would stand out, of
      semantic and of spatial heads;
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
    for name, draw, size in (("heads", _heads, (7, 6)), ("attention", _attention, (16, 8.5)),
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
    chosen, columns, style = [*order[:4], *order[-4:]], profile.columns, {"cmap": "Greys", "vmin": -4, "vmax": 0}
    panels = figure.subplots(1 + len(profile.places), len(chosen), squeeze=False)
    for number, index in enumerate(chosen):
        layer, head = divmod(index, profile.num_heads)
        mass = profile.offset_mass[layer, head].flip(0)  # upwards is up
        panels[0, number].imshow(mass.clamp_min(1e-5).log10(), aspect="auto", **style,
                                 extent=(-columns + 0.5, columns - 0.5, -0.5, len(mass) - 0.5))
        panels[0, number].set_title(f"layer {layer} head {head}: {profile.sparsity[layer, head]:.2f}", fontsize=9)
        for axes, place, mass in zip(panels[1:, number], profile.places, profile.place_mass[layer, head], strict=True):
            grid = functional.pad(mass.float(), (0, -len(mass) % columns)).view(-1, columns)
            axes.imshow(grid.clamp_min(1e-5).log10(), **style)
            axes.plot(place % columns, place // columns, "s", color="tab:red", markersize=3)
    panels[0, 0].set_ylabel("rows up (across: columns aside)")
    for axes, place in zip(panels[1:, 0], profile.places, strict=True):
        axes.set_ylabel(f"row {place // columns}, column {place % columns}")
    figure.suptitle("share of visual attention, white 0.0001 .. black 1: by relative place, and on the grid from the "
                    "marked token; title: sparsity score", fontsize=10)


def _columns(figure: Any, profile: HeadProfile, tau: float) -> None:
    left, right = figure.subplots(1, 2)
    semantic = profile.sparsity > tau
    for mask, label, style in ((semantic, "semantic heads", "-"), (~semantic, "spatial heads", "--")):
        if mask.any():
            left.plot(profile.column_mass[mask].mean(0), style, color="black", label=label)
            right.plot(profile.guidance_difference[mask].mean(0), style, color="black", linewidth=0.8, label=label)
    left.axhline(1 / profile.columns, color="grey", linewidth=0.8, label="even")
    left.set(xlabel="column of the attended token", ylabel="share of visual attention", ylim=(0, None))
    left.legend()
    for margin in range(profile.columns - 1, profile.num_visual_tokens, profile.columns):
        right.axvline(margin, color="grey", linewidth=0.3)
    right.set(xlabel="visual token (lines: last column)", ylabel="squared difference per channel",
              title="keys and values with and without the prompt", ylim=(0, None))
    right.legend()


def _kinds(figure: Any, profile: HeadProfile, tau: float) -> None:
    left, right = figure.subplots(1, 2)
    grid = torch.linspace(0, 1, 101)
    left.plot(grid, [float((profile.sparsity > value).float().mean()) for value in grid], color="black")
    left.axvline(tau, color="tab:red", label=f"tau = {tau:.2f}")
    left.set(xlabel="tau", ylabel="share of heads that are semantic", ylim=(0, 1))
    left.legend()
    for rows, style in ((1, ":"), (2, "-"), (4, "--"), (8, "-.")):
        loss = profile.window_loss(rows * profile.columns).flatten().sort().values
        right.plot(torch.linspace(0, 1, len(loss)), loss, style, color="black", label=f"{rows} row{'s' * (rows > 1)}")
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
        style = {"label": name, **_style(number)}
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


def _style(number: int) -> dict[str, Any]:
    """Marker and line of the policy of this number, readable in grey."""
    return {"marker": "osv^Dp*P<>Xhd"[number % 13], "markersize": 5, "linestyle": ("-", "--", "-.", ":")[number % 4],
            "color": (*(f"C{index}" for index in range(10)), "black", "navy", "gold")[number % 13]}


def save_comparison(entries: Iterable[Mapping[str, Any]], out: Path, order: Sequence[str]) -> dict[str, Path]:
    """Plot a comparison of policies as PNG, as far as it has been measured.

    - ``policy-fidelity.png``: mean KL against the budget, a panel per row buffer;
    - ``policy-quality.png``: likewise the overall score with its 95% interval, and the full cache's as a line;
    - ``policy-prediction.png``: predicted cost against mean KL, a mark per plan.

    Args:
        entries: of the grid of a `Comparison`'s record.
        out: folder, which must exist.
        order: of all policies; it decides their marks.

    Returns:
        The files by section of the page: "fidelity", "quality" and "prediction".

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    with needs("plot", "matplotlib"):
        from matplotlib.figure import Figure
    from .evaluation.findings import INT8, contender

    styles = {name: _style(number) for number, name in enumerate(order)}
    styles |= {f"{name}{INT8}": {**style, "fillstyle": "none", "linestyle": (0, (1, 3))}
               for name, style in styles.items()}
    rows = sorted(({**entry, "policy": contender(entry), "kept": entry["policy"]} for entry in entries),
                  key=lambda entry: (order.index(entry["kept"]), entry["policy"], entry["row_buffer"], entry["budget"]))
    measured = {name: [row for row in rows if name in row] for name in ("fidelity", "quality")}
    measured["prediction"] = [row for row in measured["fidelity"] if row.get("predicted_cost", 0) > 0
                              and row["fidelity"]["kl_mean"] > 0]
    files = {}
    for name, draw in (("fidelity", _kl_panels), ("quality", _score_panels), ("prediction", _scatter)):
        found = [row for row in measured[name] if row["kept"] != "full"]
        if not found:
            continue
        figure = Figure(figsize=(9, 6) if name == "prediction" else (12, 5.5), layout="constrained")
        draw(figure, measured[name], styles)
        files[name] = out / f"policy-{name}.png"
        write_atomically(files[name], lambda file: figure.savefig(file, format="png", dpi=110))  # noqa: B023
    return files


def _panels(figure: Any, rows: Sequence[Mapping[str, Any]], ylabel: str) -> list[tuple[Any, dict[str, list[Any]]]]:
    """One panel per row buffer, and what it shows: rows by policy."""
    buffers = sorted({row["row_buffer"] for row in rows if row["kept"] != "full"})
    budgets = sorted({row["budget"] for row in rows if row["kept"] != "full"})
    shown = []
    panels = figure.subplots(1, len(buffers), sharex=True, sharey=True, squeeze=False)[0]
    for axes, row_buffer in zip(panels, buffers, strict=True):
        lines: dict[str, list[Any]] = {}
        for row in rows:
            if row["row_buffer"] == row_buffer and row["kept"] != "full":
                lines.setdefault(row["policy"], []).append(row)
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{100 * budget:.3g}%" for budget in budgets], minor=False)
        axes.set_xticks([], minor=True)
        axes.set(title=f"row buffer {row_buffer}", xlabel="budget", ylabel=ylabel)
        axes.grid(alpha=0.3)
        shown.append((axes, lines))
    return shown


def _kl_panels(figure: Any, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, dict[str, Any]]) -> None:
    for axes, lines in _panels(figure, rows, "mean KL to the full cache, nats per token"):
        for name, found in lines.items():
            points = [(row["budget"], kl) for row in found if (kl := row["fidelity"]["kl_mean"]) > 0]
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, **styles[name])
        axes.set_yscale("log")
    _legend(figure)


def _score_panels(figure: Any, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, dict[str, Any]]) -> None:
    full = [row["quality"]["overall"] for row in rows if row["policy"] == "full"]
    for axes, lines in _panels(figure, rows, "overall score"):
        for number, (name, found) in enumerate(lines.items()):
            scores = [row["quality"]["overall"] for row in found]
            # Moved aside a little, so that intervals at one budget do not hide each other.
            budgets = [row["budget"] * (1 + 0.012 * (number - (len(lines) - 1) / 2)) for row in found]
            axes.errorbar(budgets, [score["mean"] for score in scores], label=name, capsize=2, elinewidth=0.7,
                          yerr=[[score["mean"] - score["low"] for score in scores],
                                [score["high"] - score["mean"] for score in scores]], **styles[name])
        for score in full:
            axes.axhline(score["mean"], color="black", linewidth=0.8, label="full")
            axes.axhspan(score["low"], score["high"], color="black", alpha=0.08)
    _legend(figure)


def _scatter(figure: Any, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, dict[str, Any]]) -> None:
    axes = figure.subplots()
    buffers = sorted({row["row_buffer"] for row in rows})
    for name, style in styles.items():
        for row_buffer in buffers:
            found = [row for row in rows if (row["policy"], row["row_buffer"]) == (name, row_buffer)]
            if found:
                axes.plot([row["predicted_cost"] for row in found], [row["fidelity"]["kl_mean"] for row in found],
                          label=f"{name}, row buffer {row_buffer}", alpha=0.8,
                          **{**style, "linestyle": "none", "color": "black",
                             "fillstyle": ("none", "full", "left", "top")[buffers.index(row_buffer) % 4]})
    axes.set(xscale="log", yscale="log", xlabel="predicted cost, nats per token",
             ylabel="mean KL to the full cache, nats per token")
    axes.grid(alpha=0.3)
    _legend(figure)


def _legend(figure: Any) -> None:
    """One legend beside the panels; each name once."""
    names = {name: handle for axes in figure.axes
             for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(names.values(), names.keys(), loc="outside right center", fontsize="small")
