"""The page about a comparison of policies: its record as Markdown, one text per section of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .findings import FULL, Key, contender, key, percent
from .report import markdown_table
from .statistics import Interval, paired_difference

SECTIONS = ("goals", "runs", "fidelity", "quality", "sensitivity", "prediction", "int8")
PARTS = ("fidelity", "quality", "sensitivity")
ABSENT = "not measured\n"
IMPOSSIBLE = "-"

Entry = Mapping[str, Any]


def sections(record: Mapping[str, Any], order: Sequence[str], images: Mapping[str, str]) -> dict[str, str]:
    """Markdown for every section.

    Args:
        record: of a `Comparison`.
        order: policies from top to bottom.
        images: addresses of plots, by the name of their section.
    """
    rank = {name: number for number, name in enumerate(order)}
    entries = sorted(record["grid"].values(), key=lambda entry: (
        rank[entry["policy"]], contender(entry), entry["row_buffer"], entry["budget"]))
    made = {"goals": _goals(record["goals"]), "runs": _runs(record["parts"]),
            "fidelity": _fidelity([entry for entry in entries if "fidelity" in entry or "reason" in entry]),
            "quality": _quality([entry for entry in entries if "quality" in entry or "reason" in entry]),
            "sensitivity": _sensitivity(list(record["sensitivity"].values())),
            "prediction": _prediction(record["prediction"], entries),
            "int8": _int8(entries, record)}
    if record["profile"] is not None:
        made["runs"] += _profile(record["profile"])
    return {name: text + (f'\n<img src="{images[name]}" width="800" alt="{name} of the policies">\n'
                          if name in images and text != ABSENT else "") for name, text in made.items()}


def goal_lines(goals: Iterable[Mapping[str, Any]]) -> list[str]:
    """One sentence per goal, its verdict first."""
    verdict = {True: "Reached", False: "Missed", None: "Not decided"}
    return [f"{verdict[goal['reached']]} ({goal['measure']}, row buffer {goal['row_buffer']}): {goal['text']}."
            for goal in goals]


def _goals(goals: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"- {line}\n" for line in goal_lines(goals)) or ABSENT


def _runs(parts: Mapping[str, Sequence[Mapping[str, Any]]], names: Iterable[str] = PARTS) -> str:
    text = ""
    for name in names:
        if name not in parts:
            text += f"- {name}: not measured, or not finished\n"
        for facts in parts.get(name, ()):
            judged = f"{facts['prompts']} prompts x {facts['seeds']} seeds"
            drawn = judged if name == "quality" else f"{facts['fidelity_prompts']} prompts"
            if name == "sensitivity" and facts["sensitivity_quality"]:
                drawn += f", {judged} for quality"
            text += (f"- {name}: {facts['date']}, {drawn}, guidance {facts['guidance']:g}, batches of "
                     f"{facts['batch_size']}; {facts['machine']}; `{facts['command']}`\n")
    return text


def _profile(facts: Mapping[str, Any]) -> str:
    shared = f"{facts['shared']} of them" if facts["shared"] else "none of them"
    time = "" if facts["seconds"] is None else f" in {facts['seconds']} s"  # as profiles of earlier releases know it
    return f"- profile: {facts['prompts']} prompts{time}, {shared} also measured here\n"


def _fidelity(entries: Sequence[Entry]) -> str:
    tables = (("mean KL", lambda found: f"{found['kl_mean']:.3g}"), ("99th percentile of KL", lambda found:
              f"{found['kl_p99']:.3g}"), ("same most probable token", lambda found: f"{found['agreement']:.2%}"))
    text = "\n".join(_by_budget(entries, "fidelity", row_buffer, title, show)
                     for row_buffer in _row_buffers(entries, "fidelity") for title, show in tables)
    known = [entry for entry in entries if "fidelity" in entry and entry["fidelity"]["kl_interval"]]
    if known:
        rows = [[contender(entry), str(entry["row_buffer"]), f"{entry['reached']:.1%}", _kl(entry["fidelity"])]
                for entry in known]
        table = markdown_table(["policy", "row buffer", "budget reached", "mean KL"], rows)
        text += f"\n<details><summary>Mean KL with 95% intervals over prompts</summary>\n\n{table}\n</details>\n"
    return text or ABSENT


def _quality(entries: Sequence[Entry]) -> str:
    text = "\n".join(_by_budget(entries, "quality", row_buffer, "overall", lambda found: _score(found["overall"]))
                     for row_buffer in _row_buffers(entries, "quality"))
    measured = [entry for entry in entries if "quality" in entry]
    if not measured:
        return ABSENT
    families = list(measured[0]["quality"]["families"])
    rows = [[contender(entry), f"{entry['reached']:.1%}", str(entry["row_buffer"]), str(entry["quality"]["pictures"]),
             *(_score(entry["quality"]["families"][name]) for name in families)] for entry in measured]
    head = ["policy", "budget reached", "row buffer", "pictures", *(name.replace("_", " ") for name in families)]
    return (f"{text}\n<details><summary>The families</summary>\n\n{markdown_table(head, rows)}\n</details>\n").lstrip()


def _by_budget(entries: Sequence[Entry], measure: str, row_buffer: int, title: str,
               show: Callable[[Any], str]) -> str:
    """Policies down, budgets across; the full cache, which has no row buffer, in every such table."""
    chosen = [entry for entry in entries if entry["row_buffer"] == row_buffer or entry["policy"] == "full"]
    budgets = sorted({entry["budget"] for entry in chosen})
    cells: dict[str, dict[float, str]] = {}
    for entry in chosen:
        cells.setdefault(contender(entry), {})[entry["budget"]] = (
            show(entry[measure]) if measure in entry else IMPOSSIBLE)
    rows = [[name, *(row.get(budget, "") for budget in budgets)] for name, row in cells.items()]
    return (f"{title[0].upper()}{title[1:]}, row buffer {row_buffer}:\n\n"
            + markdown_table(["policy", *map(percent, budgets)], rows))


def _sensitivity(entries: Sequence[Entry]) -> str:
    measured = [entry for entry in entries if "fidelity" in entry or "quality" in entry or "reason" in entry]
    tables = []
    for study in dict.fromkeys(entry["study"] for entry in measured):
        rows = []
        for entry in measured:
            if entry["study"] != study:
                continue
            close, score = entry.get("fidelity"), entry.get("quality")
            figures = ([_kl(close), f"{close['kl_p99']:.3g}", f"{close['agreement']:.2%}"] if close
                       else [IMPOSSIBLE if "reason" in entry else ""] * 3)
            rows.append([entry["policy"], entry["setting"], f"{entry['reached']:.1%}" if "reached" in entry else "",
                         *figures, _score(score["overall"]) if score else ""])
        head = ["policy", study, "budget reached", "mean KL", "99th percentile", "same token", "overall quality"]
        if not any(row[-1] for row in rows):
            head, rows = head[:-1], [row[:-1] for row in rows]
        tables.append(f"{study[0].upper()}{study[1:]}:\n\n{markdown_table(head, rows, 2)}")
    return "\n".join(tables) or ABSENT


def _prediction(found: Mapping[str, Any] | None, entries: Sequence[Entry]) -> str:
    if not found or found["spearman"] is None:
        return ABSENT
    groups = {(group["budget"], group["row_buffer"]): group for group in found["groups"]}
    budgets, buffers = (sorted({key[index] for key in groups}) for index in (0, 1))
    rows = [[str(buffer), *(_rho(groups.get((budget, buffer))) for budget in budgets)] for buffer in buffers]
    ratios = [{**entry, "ratio": entry["fidelity"]["kl_mean"] / entry["predicted_cost"]} for entry in entries
              if "fidelity" in entry and entry.get("predicted_cost", 0) > 0]
    tables = "\n".join(
        _by_budget(ratios, "ratio", row_buffer, "mean KL over predicted cost", lambda ratio: f"{ratio:.2g}")
        for row_buffer in _row_buffers(ratios, "ratio"))
    return (f"Spearman's rank correlation over {found['plans']} plans: **{found['spearman']:.2f}**. Larger budgets "
            "alone bring much of that, so the table has it for the plans of each budget (their number in brackets):"
            "\n\n"
            + markdown_table(["row buffer", *map(percent, budgets)], rows) + "\n" + tables)


def _int8(entries: Sequence[Entry], record: Mapping[str, Any]) -> str:
    """Plans in both formats at equal bytes, prompt by prompt; nothing without plans in 8 bits."""
    measured = [entry for entry in entries if "quality" in entry or "fidelity" in entry]
    if not any(entry.get("kv_format") == "int8" for entry in measured):
        return ABSENT
    by_key = {key(entry): entry for entry in measured}
    rows = []
    for entry in measured:
        scored, close = entry.get("quality"), entry.get("fidelity")
        beside: Key = (entry["policy"], entry["budget"], entry["row_buffer"])
        tokens = entry.get("tokens", entry["reached"])  # records without are older than other formats
        rows.append([contender(entry), str(entry["row_buffer"]), f"{entry['reached']:.1%}", f"{tokens:.1%}",
                     _score(scored["overall"]) if scored else "",
                     _lead(entry, by_key.get(FULL)), _lead(entry, by_key.get(beside)),
                     _kl(close) if close else "",
                     f"{entry['predicted_cost']:.3g}" if entry.get("predicted_cost") else ""])
    head = ["policy", "row buffer", "bytes", "tokens", "right pictures", "more than the full cache",
            "more than at as many bytes in the model's dtype", "mean KL", "predicted cost"]
    runs = _runs(record["parts"], record["parts"])
    return f"{_goals(record.get('int8_goals', ()))}\n{markdown_table(head, rows)}\n{runs}"


def _lead(ours: Entry, theirs: Entry | None) -> str:
    """By how much more pictures are right, prompt by prompt."""
    if theirs is None or theirs is ours or not ("quality" in ours and "quality" in theirs):
        return ""
    lead = paired_difference(ours["quality"]["by_prompt"], theirs["quality"]["by_prompt"])
    return "" if lead is None else f"{lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"


def _rho(group: Mapping[str, Any] | None) -> str:
    return "" if group is None or group["spearman"] is None else f"{group['spearman']:.2f} ({group['plans']})"


def _row_buffers(entries: Iterable[Entry], measure: str) -> list[int]:
    return sorted({entry["row_buffer"] for entry in entries if measure in entry and entry["policy"] != "full"})


def _kl(found: Mapping[str, Any]) -> str:
    interval = found["kl_interval"]
    return f"{found['kl_mean']:.3g}" + (f" [{interval['low']:.2g}, {interval['high']:.2g}]" if interval else "")


def _score(interval: Mapping[str, float]) -> str:
    return str(Interval(**interval))
