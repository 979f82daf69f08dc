"""Read and check the record of a comparison, ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssd_kernels.kv_format import KV_FORMATS
from ssd_kernels.reading import Field, naming, read_json, shown
from ssd_kernels.schema import count, list_of, mapping_of, maybe, number, object_of

from .folder import LARGEST

TEXT, FLAG, FIGURE = Field.string, Field.boolean, Field.number

INTERVAL = object_of(dict.fromkeys(("mean", "low", "high"), FIGURE))
QUALITY = object_of({"families": mapping_of(INTERVAL), "overall": INTERVAL, "by_prompt": mapping_of(list_of(number, 1)),
                     "pictures": count, "budget": number})
FIDELITY = object_of({
    "kl_mean": number, "kl_p99": number, "kl_interval": maybe(INTERVAL), "kl_by_picture": list_of(number, 1),
    "kl_by_row": list_of(number, 1), "agreement": number, "head_error": list_of(list_of(number, 1), 1),
    "psnr_db": maybe(FIGURE), "ssim": maybe(FIGURE), "pictures": count, "budget": number})
ENTRY = object_of(
    {"policy": TEXT, "budget": number, "row_buffer": count, "study": TEXT, "setting": TEXT, "guidance": FIGURE},
    {"kv_format": lambda field: field.choice(KV_FORMATS), "reason": TEXT, "tokens": number, "reached": number,
     "predicted_cost": FIGURE, "fidelity": FIDELITY, "quality": QUALITY})
FACTS = object_of({"command": TEXT, "date": TEXT, "machine": TEXT, "guidance": FIGURE, "fidelity_prompts": count,
                   "prompts": count, "seeds": count, "batch_size": count, "sensitivity_quality": FLAG}, {"dtype": TEXT})
PARTS = object_of({}, dict.fromkeys(("fidelity", "quality", "sensitivity"), list_of(FACTS)))
PROFILE = object_of({"prompts": count, "seconds": maybe(number), "shared": count})
RECORD = object_of({"parts": PARTS, "grid": mapping_of(ENTRY), "sensitivity": mapping_of(ENTRY),
                    "profile": maybe(PROFILE), "prediction": lambda field: None, "goals": lambda field: None},
                   {"int8_goals": lambda field: None})


def read_record(file: Path) -> dict[str, Any]:
    """The record of a `comparison.Comparison`; its conclusions, "prediction" and "goals", have to be drawn again.

    Raises:
        OSError: the file cannot be read.
        ValueError: no such record, or damaged; the message names file and field, and says what to do.
    """
    try:
        value = read_json(file, LARGEST)
        with naming(file):
            found: dict[str, Any] = RECORD(Field(value))
            _check_pairs(found["grid"])
        return found
    except ValueError as error:
        raise ValueError(f"{error}; remove the file: results are summed up again from what is measured, as far as a "
                         "call asks for them") from None


def _check_pairs(grid: Mapping[str, Mapping[str, Any]]) -> None:
    """Plans are compared prompt by prompt, so all must have figures of as many."""
    sizes: dict[str, Any] = {}
    for label, entry in grid.items():
        for measure, name in (("fidelity", "kl_by_picture"), ("quality", "by_prompt")):
            if measure not in entry:
                continue
            found = entry[measure][name]
            size = {key: len(values) for key, values in found.items()} if isinstance(found, dict) else len(found)
            if sizes.setdefault(measure, size) != size:
                raise ValueError(f"grid.{label}.{measure}.{name} must be of as many prompts as the others, "
                                 f"{shown(sizes[measure])}, got {shown(size)}")
