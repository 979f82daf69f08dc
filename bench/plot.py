"""`ssd-bench plot`: pictures of results, PNG and SVG. Contenders differ by marker and line, not by colour alone."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ssd_janus.extras import needs
from ssd_kernels.files import write_atomically

from .ceiling import LOOP, READ
from .records import Record, differing, measured
from .tables import decoder_title

MARKERS, LINES = "os^Dv*P<X>hp", ("-", "--", "-.", ":")
OURS_COLOUR, COLOURS = "black", ("#c1272d", "#0072b2", "#777777", "#d98c00", "#4b8b3b", "#9467bd")
PARTS = ("linear", "attention", "rest")


def figures(lines: Iterable[Record]) -> dict[str, Any]:
    """Matplotlib figures by name, as far as the records go: ``roofline``, ``time-batch``, ``time-slots``,
    ``memory-batch``, ``step-breakdown``, ``place``.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    with needs("plot", "matplotlib"):
        import matplotlib.figure  # noqa: F401
    found = measured(lines)
    kernels = [line for line in found if line["kind"] == "kernel" and line["contender"]["name"] not in (LOOP, READ)]
    drawn = {
        "roofline": _roofline(kernels),
        "time-batch": _sweep(kernels, "batch", "rows in the batch", _microseconds, "us per layer and step"),
        "time-slots": _sweep(kernels, "mean", "mean tokens per head", _microseconds, "us per layer and step"),
        "memory-batch": _sweep(kernels, "batch", "rows in the batch", _megabytes, "MB held per layer"),
        "step-breakdown": _breakdown([line for line in found if "split" in line]),
        "place": _place([line for line in found if "by_row" in line]),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save_all(lines: Iterable[Record], out: Path) -> list[Path]:
    """Write every figure as PNG and SVG into the folder ``out``, which is made; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures(lines).items():
        for kind in ("png", "svg"):
            path = out / f"{name}.{kind}"
            data = render(figure, kind)
            write_atomically(path, lambda file: file.write(data))  # noqa: B023
            files.append(path)
    return files


def render(figure: Any, kind: str) -> bytes:
    """A figure as the bytes of a file; SVG keeps its text as text, so that it can be searched and read aloud."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ssd-bench"}):
        figure.savefig(buffer, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _microseconds(line: Record) -> float:
    return float(1e6 * line["seconds"]["best"])


def _megabytes(line: Record) -> float:
    return float(line["bytes"]["allocated"] / 1e6)


def _names(lines: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(line["contender"]["name"] for line in lines))


def _styles(lines: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Marker, line and colour by contender; ours are black and thick."""
    ours = {line["contender"]["name"] for line in lines if line["contender"].get("backend")}
    styles: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(_names(lines)):
        mine = name in ours
        styles[name] = {"marker": MARKERS[number % len(MARKERS)], "linestyle": LINES[number % len(LINES)],
                        "color": OURS_COLOUR if mine else COLOURS[number % len(COLOURS)],
                        "linewidth": 2 if mine else 1.2, "markersize": 7 if mine else 6,
                        "fillstyle": "full" if mine else "none"}
    return styles


def _panels(lines: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """One panel per device, run and dtype."""
    groups: dict[str, list[Record]] = {}
    apart = _apart(lines)
    for line in lines:
        where = line["machine"].get("gpu") or line["machine"]["processor"]
        groups.setdefault(f"{where}, {line['point']['dtype']}{apart(line)}", []).append(line)
    return list(groups.items())


def _apart(lines: Sequence[Record]) -> Callable[[Record], str]:
    """What tells the runs among records apart, to be added to a title: numbers of several are never in one panel."""
    names = list(differing(lines))
    return lambda line: "".join(f"\n{name} {line['machine'].get(name)}" for name in names)


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels + 3.2, 4.8), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _legend(figure: Any) -> None:
    handles = {name: handle for axes in figure.axes
               for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small", frameon=False)


def _roofline(lines: Sequence[Record]) -> Any:
    """Arithmetic on kept tokens against bytes read for it, under the measured bandwidth (Williams et al., 2009)."""
    biggest: dict[str, list[Record]] = {}
    for name, group in _panels(lines):
        # One point of each panel: several would hide each other.
        point = max((line["point"] for line in group), key=lambda point: _prominence(group, point))
        biggest[name] = [line for line in group if line["point"] == point]
    if not biggest:
        return None
    figure, axes = _figure(len(biggest))
    styles = _styles(lines)
    for panel, (name, group) in zip(axes, biggest.items(), strict=True):
        ceiling = max(group[0]["ceiling"].values())
        points = [(*_intensity(line), line["contender"]["name"]) for line in group]
        low, high = 0.6 * min(x for x, _, _ in points), 1.6 * max(x for x, _, _ in points)
        panel.plot([low, high], [ceiling * low / 1e9, ceiling * high / 1e9], color="black", linewidth=1,
                   label="measured bandwidth")
        for x, y, contender in points:
            panel.plot(x, y / 1e9, label=contender, **{**styles[contender], "linestyle": "none"})
        point = group[0]["point"]
        panel.set(title=f"{name}\nbatch {point['batch']}, {point['label']}, ceiling {ceiling / 1e9:.1f} GB/s",
                  xscale="log", yscale="log", xlabel="useful FLOP per byte read", ylabel="useful GFLOP/s")
        panel.title.set_fontsize("medium")
        ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if low <= tick <= high]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3, which="both")
    _legend(figure)
    return figure


def _prominence(lines: Sequence[Record], point: dict[str, Any]) -> tuple[float, ...]:
    """Most contenders first, then what is nearest to the default point."""
    peers = sum(line["point"] == point for line in lines)
    return peers, -abs(math.log(point["batch"] / 16)), -abs(math.log(point["mean"] / 120))


def _intensity(line: Record) -> tuple[float, float]:
    """Useful floating-point operations per byte read, and per second: two products of D per kept token."""
    point = line["point"]
    work = 4 * point["batch"] * sum(point["lengths"]) * point["head_dim"]
    return work / line["bytes"]["read"], work / line["seconds"]["best"]


def _sweep(lines: Sequence[Record], axis: str, xlabel: str, value: Callable[[Record], float], ylabel: str) -> Any:
    """Lines over one axis of the points, the others fixed at the setting with most values along it."""
    shown = []
    for name, group in _panels(lines):
        series: dict[str, list[Record]] = {}
        for line in group:
            fixed = {key: value for key, value in line["point"].items()
                     if key not in (axis, "lengths", "label") and (axis != "batch" or key != "mean")}
            if axis == "batch":
                fixed["label"] = line["point"]["label"]
            series.setdefault(repr(sorted(fixed.items())), []).append(line)
        best = max(series.values(), key=lambda found: len({line["point"][axis] for line in found}))
        if len({line["point"][axis] for line in best}) > 1:
            shown.append((name, best))
    if not shown:
        return None
    figure, axes = _figure(len(shown))
    styles = _styles(lines)
    for panel, (name, group) in zip(axes, shown, strict=True):
        for contender in _names(group):
            points = sorted({line["point"][axis]: value(line) for line in group
                             if line["contender"]["name"] == contender}.items())
            if len(points) == 1:  # no line to draw
                continue
            panel.plot(*zip(*points, strict=True), label=contender, **styles[contender])
        ticks = sorted({line["point"][axis] for line in group})
        point = group[0]["point"]
        rest = point["label"] if axis == "batch" else f"batch {point['batch']}"
        panel.set(title=f"{name}\n{rest}, {point['heads']} heads x {point['head_dim']}", xlabel=xlabel, ylabel=ylabel,
                  xscale="log", yscale="log")
        panel.title.set_fontsize("medium")
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3, which="both")
    _legend(figure)
    return figure


def _by_title(lines: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    apart = _apart(lines)
    for line in lines:
        groups.setdefault(decoder_title(line) + apart(line), []).append(line)
    return groups


def _place(lines: Sequence[Record]) -> Any:
    """Time of a step against the row of the picture."""
    groups = _by_title(lines)
    if not groups:
        return None
    figure, axes = _figure(len(groups))
    styles = _styles(lines)
    for panel, (title, group) in zip(axes, groups.items(), strict=True):
        for number, line in enumerate(group):
            # A marker at every fourth row, each contender at other ones: close lines stay apart.
            panel.plot(range(1, len(line["by_row"]) + 1), [1e3 * seconds for seconds in line["by_row"]],
                       label=line["contender"]["name"], markevery=(number % 4, 4),
                       **{**styles[line["contender"]["name"]], "linewidth": 1.2})
        panel.set(xlabel="row of the picture", ylabel="ms per decoder step", ylim=(0, None))
        panel.set_title(title.replace(", model", "\nmodel"), fontsize="medium")
        panel.grid(alpha=0.3)
    _legend(figure)
    return figure


def _breakdown(lines: Sequence[Record]) -> Any:
    """Stacked bars of a decoder step: linear layers, attention, rest."""
    groups = _by_title(lines)
    if not groups:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.9 + sum(0.6 + 0.3 * len(group) for group in groups.values())), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[2 + len(group) for group in groups.values()])
    for panel, (title, group) in zip(axes[:, 0], groups.items(), strict=True):
        names, left = [line["contender"]["name"] for line in group], [0.0] * len(group)
        for part, shade, hatch in zip(PARTS, ("#dddddd", "#555555", "white"), ("", "", "///"), strict=True):
            widths = [1e3 * line["split"][part] for line in group]
            panel.barh(names, widths, left=left, color=shade, edgecolor="black", hatch=hatch, label=part, linewidth=0.6)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        panel.invert_yaxis()
        panel.set_title(title, fontsize="medium", loc="left")
        panel.set_xlabel("ms per decoder step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure
