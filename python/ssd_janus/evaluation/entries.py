"""What a comparison has found: one file per finding, so that several processes can add to one folder.

``OUT/results.json`` is summed up from them. Files of findings are ``OUT/results/TABLE/MEASURE/LABEL.json``, of how they
were made ``OUT/results/parts/PART-DIGEST.json``, and of what the profile cost ``OUT/results/profile.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ssd_kernels.reading import Field, naming, read_json

from ..files import write_text
from .folder import LARGEST
from .results import ENTRY, FACTS, PROFILE, read_record

TABLES = ("grid", "sensitivity")
MEASURES = ("fidelity", "quality")
SUFFIX = ".json"


class Entries:
    """The findings of a folder."""

    def __init__(self, out: Path) -> None:
        """
        Args:
            out: of the comparison. Where its ``results.json`` has what has no file, as those of earlier releases do, it
                gets one.

        Raises:
            ValueError: that file is damaged; the message names it.
        """
        self.path = out / "results"
        if not (out / "results.json").exists():
            return
        record = read_record(out / "results.json")
        for table in TABLES:
            for label, entry in record[table].items():
                head = {name: value for name, value in entry.items() if name not in MEASURES}
                for measure in MEASURES:
                    if (measure in entry or "reason" in entry) and not self._file(table, measure, label).exists():
                        found = {measure: entry[measure]} if measure in entry else {}
                        self.add(table, measure, label, {**head, **found})
        for part, runs in record["parts"].items():
            for facts in runs:
                self.add_run(part, facts)
        if record["profile"] is not None and not self._profile.exists():
            self.add_profile(record["profile"])

    def add(self, table: str, measure: str, label: str, entry: Mapping[str, Any]) -> None:
        """Keep a finding: what one measure says about one case, or the reason why there can be none."""
        self._write(self._file(table, measure, label), entry)

    def add_run(self, part: str, facts: Mapping[str, Any]) -> None:
        """Keep how findings of a part were made; several processes, or calls, that made them alike count once."""
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
        self._write(self.path / "parts" / f"{part}-{digest}{SUFFIX}", facts)

    def add_profile(self, cost: Mapping[str, Any]) -> None:
        """Keep what the profile cost."""
        self._write(self._profile, cost)

    def read(self) -> dict[str, Any]:
        """All findings: "parts", "grid", "sensitivity" and "profile" of a record, in no order of the cases.

        Raises:
            ValueError: a file is damaged; the message names it and says what to do.
        """
        record: dict[str, Any] = {"parts": {}, "profile": None}
        for table in TABLES:
            record[table] = {}
            for measure in MEASURES:
                for file, name in self._files(f"{table}/{measure}"):
                    known = record[table].setdefault(unquote(name), {})
                    known.update(self._read(file, ENTRY))
            for entry in record[table].values():
                if any(measure in entry for measure in MEASURES):
                    entry.pop("reason", None)
        runs = [(name.rpartition("-")[0], self._read(file, FACTS)) for file, name in self._files("parts")]
        for part, facts in sorted(runs, key=lambda run: (run[1]["date"], json.dumps(run[1], sort_keys=True))):
            record["parts"].setdefault(part, []).append(facts)
        record["parts"] = {part: record["parts"][part] for part in sorted(record["parts"])}
        if self._profile.exists():
            record["profile"] = self._read(self._profile, PROFILE)
        return record

    def state(self) -> set[tuple[str, int]]:
        """Changes whenever a finding is added."""
        return {(str(file), file.stat().st_mtime_ns) for file in self.path.rglob(f"*{SUFFIX}")}

    @property
    def _profile(self) -> Path:
        return self.path / f"profile{SUFFIX}"

    def _file(self, table: str, measure: str, label: str) -> Path:
        return self.path / table / measure / f"{quote(label, safe=' ')}{SUFFIX}"

    def _files(self, folder: str) -> Iterator[tuple[Path, str]]:
        for file in sorted((self.path / folder).glob(f"*{SUFFIX}")):
            yield file, file.name.removesuffix(SUFFIX)

    @staticmethod
    def _read(file: Path, check: Any) -> dict[str, Any]:
        try:
            with naming(file):
                found: dict[str, Any] = check(Field(read_json(file, LARGEST)))
            return found
        except ValueError as error:
            raise ValueError(f"{error}; remove the file: a call that asks for it sums it up again") from None

    @staticmethod
    def _write(file: Path, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=1) + "\n"
        if file.exists() and file.read_bytes() == text.encode():
            return  # or all that read it would have to look again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
