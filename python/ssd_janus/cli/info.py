"""The command ``info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .terminal import print_table, table


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what was built and what can run here."""
    import importlib.metadata

    import ssd_kernels

    facts = ssd_kernels.info()
    facts["transformers"] = importlib.metadata.version("transformers")
    facts["included_model"] = _included_model_or_none()
    if as_json:
        print(json.dumps(facts))
        return
    rows = [(name, str(facts[name])) for name in ("version", "python", "torch", "transformers", "machine", "threads",
                                                  "cpus", "waiting")]
    rows.append(("cpu quota", "none" if facts["cpu_quota"] is None else f"{facts['cpu_quota']:g}"))
    rows.append(("openmp", ", ".join(facts["openmp"]) or "not known"))
    for name, value in facts["extension"].items():
        rows.append((f"extension {name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    for name, state in facts["backends"].items():
        rows.append((f"backend {name}", "can run here" if state["available"] else f"cannot run: {state['reason']}"))
    rows.append(("included model", facts["included_model"] or "not installed"))
    print_table(table(rows))


def _included_model_or_none() -> str | None:
    from ..checkpoints import included_model

    try:
        return included_model()
    except FileNotFoundError:
        return None
