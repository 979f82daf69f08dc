"""Who imports whom: the modules of `ssd_kernels` stand in layers, and imports inside functions count too."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ssd_kernels

ROOT = Path(ssd_kernels.__file__).parent


def imports(root: Path) -> dict[str, set[str]]:
    """For every module below ``root`` the modules below it that it names in an import, wherever that stands.

    That a module's package is imported before it, as Python does, does not count.
    """
    names = {".".join((root.name, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
             for path in root.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package.rsplit(".", node.level - 1)[0] if node.level else ""
                base = ".".join(part for part in (base, node.module) if part)
                wanted = [inner if (inner := f"{base}.{alias.name}") in names else base for alias in node.names]
            else:
                continue
            found[name] |= {module for module in wanted if module in names}
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = imports(ROOT)
    assert "ssd_kernels.layout" in graph["ssd_kernels.plan"] and "ssd_kernels.plan" in graph["ssd_kernels.cache"]
    assert "ssd_kernels.triton.decode" in graph["ssd_kernels.backends.triton"]  # inside a function
    assert "ssd_kernels.policies.profile" in graph["ssd_kernels.policies"]
    assert "ssd_kernels.ops" in graph["ssd_kernels"]
    TopologicalSorter(graph).prepare()


def test_cycles_are_found(tmp_path: Path) -> None:
    """Of every way to write an import."""
    for first, second in (("import room.b", "from . import a"), ("def f():\n    from .b import x", "import room.a"),
                          ("from room import b", "from room.a import x"),
                          ("if 0:\n    from . import b", "from .a import x")):
        (tmp_path / "room").mkdir(exist_ok=True)
        for name, text in (("__init__", ""), ("a", first), ("b", second)):
            (tmp_path / "room" / f"{name}.py").write_text(text)
        with pytest.raises(CycleError):
            TopologicalSorter(imports(tmp_path / "room")).prepare()
