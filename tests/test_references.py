"""What code, tests and docs refer to exists: files, sections, links, make targets, commands and options, names."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"bench": "bench", "constraints": "constraints", "csrc": "csrc", "docs": "docs", "python": "python",
         "ssd_attach": "python/ssd_attach", "ssd_janus": "python/ssd_janus", "ssd_kernels": "ssd_kernels",
         "ssd_shapes": "python/ssd_shapes",
         "tests": "tests", "tools": "tools"}
PACKAGES = {"ssd_attach": "python/ssd_attach", "ssd_bench": "bench", "ssd_janus": "python/ssd_janus",
            "ssd_kernels": "ssd_kernels", "ssd_shapes": "python/ssd_shapes"}
SUFFIXES = {".py", ".pyi", ".md", ".h", ".cuh", ".cu", ".cpp", ".toml", ".txt", ".in"}
WORDS = frozenset({"a", "it", "up", "one", "no", "the"})  # "make it"


def sources() -> list[Path]:
    """Every text of the repository, this one excepted: its planted references are wrong."""
    rooms = [path for room in ("bench", "constraints", "csrc", "docs", "python", "ssd_kernels", "tests", "tools")
             for path in (ROOT / room).rglob("*") if path.suffix in SUFFIXES]
    return sorted({*rooms, *(ROOT / name for name in ("README.md", "Makefile", "CMakeLists.txt", "pyproject.toml",
                                                      "setup.py", ".ci/run"))} - {Path(__file__).resolve()})


def unwrapped(text: str) -> str:
    """``text`` in one line, without the comment marks at the beginnings of its lines."""
    return re.sub(r"\s*\n[ \t]*(?://|#)?[ \t]*", " ", text)


def code_of(text: str) -> Iterator[str]:
    """What stands in backticks, and the lines of Markdown's code blocks and of indented commands in comments."""
    yield from (unwrapped(code) for code in re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text))
    yield from re.findall(r"^(?:#? {0,4})((?:make|ssd-janus|ssd-bench) [^\n`]*)", text, re.MULTILINE)


@functools.cache
def anchors(file: Path) -> frozenset[str]:
    """The anchors of a Markdown file's headings, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings)


@functools.cache
def sections(file: Path) -> frozenset[str]:
    """Numbers of a Markdown file's sections."""
    return frozenset(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", file.read_text(), re.MULTILINE))


@functools.cache
def make_targets() -> frozenset[str]:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", text, re.MULTILINE)
    variables = dict(re.findall(r"^(\w+) *[:?]?= *(.*)$", text, re.MULTILINE))
    names = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], phony[1]) if phony else ""
    return frozenset(names.replace("\\", " ").split())


@functools.cache
def options_of(program: str) -> dict[str, frozenset[str]]:
    """Command -> its options."""
    from ssd_bench.cli import app as bench_app
    from ssd_janus.cli import app as janus_app

    group = typer.main.get_command(janus_app if program == "ssd-janus" else bench_app)
    return {name: frozenset(option for parameter in command.params
                            for option in (*parameter.opts, *parameter.secondary_opts)) | {"--help"}
            for name, command in group.commands.items()}


@functools.cache
def names_in(file: Path) -> dict[str, ast.AST]:
    """What a module defines or imports, at its outermost level."""
    return dict(_bound(ast.parse(file.read_text()).body))


def _bound(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name.partition(".")[0], node) for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((name.id, node) for target in targets for name in ast.walk(target)
                        if isinstance(name, ast.Name))
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _bound(node.body + node.orelse)


@functools.cache
def class_members() -> dict[str, frozenset[str] | None]:
    """Members of the packages' classes; None where they cannot be told: two classes of one name, other bases."""
    found: dict[str, frozenset[str] | None] = {}
    for folder in PACKAGES.values():
        for file in (ROOT / folder).rglob("*.py"):
            for name, node in names_in(file).items():
                if isinstance(node, ast.ClassDef):
                    found[name] = None if name in found or node.bases else frozenset(members_of(node))
    return found


def members_of(node: ast.ClassDef) -> Iterator[str]:
    """Methods, fields, and attributes that methods set."""
    yield from (name for name, _ in _bound(node.body))
    yield from (part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
                and isinstance(part.value, ast.Name) and part.value.id == "self")


def wrong_paths(file: Path, text: str) -> Iterator[str]:
    """Paths that begin with a room of the repository, and Markdown's links."""
    for path in re.findall(rf"(?<![\w/.\-])(?:{'|'.join(ROOMS)})/[\w./*\-]*\w", text):
        room, _, rest = path.partition("/")
        if re.search(r"/[A-Z]+(?:/|$)", path):  # a name that the reader fills in
            continue
        if not any(ROOT.glob(f"{ROOMS[room]}/{rest}")):
            yield path
    for number in re.findall(r"docs/(\w+\.md), sections? ((?:\d[\d.]*(?:, | and )?)+)", unwrapped(text)):
        for section in re.findall(r"\d+(?:\.\d+)*", number[1]):
            if section not in sections(ROOT / "docs" / number[0]):
                yield f"docs/{number[0]}, section {section}"
    if file.suffix == ".md":
        for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
            target, _, anchor = (link[0] or link[1]).partition("#")
            if "://" in target:
                continue
            where = (file.parent / target) if target else file
            if not where.exists() or (anchor and anchor not in anchors(where)):
                yield link[0] or link[1]
    if file.name == "specification.md":
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        yield from (number for number in re.findall(r"(?<![\w.])[1-9]\.\d+\b", prose)
                    if number not in sections(ROOT / "docs" / file.name))


def wrong_commands(file: Path, text: str) -> Iterator[str]:
    """`make X`, `ssd-janus X --option` and `ssd-bench X --option` in backticks, code blocks and brackets."""
    for code in (*code_of(text), *re.findall(r"\((make [a-z\-]+)", text)):
        words = code.split()
        if words[:1] == ["make"] and len(words) > 1 and re.fullmatch(r"[a-z\-]+", words[1]):
            if words[1] not in make_targets() | WORDS:
                yield " ".join(words[:2])
        elif words and words[0] in ("ssd-janus", "ssd-bench") and len(words) > 1 and words[1].isalpha():
            commands = options_of(words[0])
            if words[1] not in commands:
                yield " ".join(words[:2])
                continue
            try:
                words = shlex.split(code, comments=True)
            except ValueError:  # a quotation that goes on in the next line
                continue
            for word in words[2:]:
                option = word.partition("=")[0]
                if option.startswith("--") and option not in commands[words[1]]:
                    yield f"{words[0]} {words[1]} {option}"


def wrong_names(file: Path, text: str) -> Iterator[str]:
    """`package.module.name` and `Class.member` in backticks."""
    for code in code_of(text):
        dotted = re.match(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", code)
        if dotted is None or "/" in code or dotted[0].endswith((".py", ".md", ".h")):
            continue
        first, *rest = dotted[0].split(".")
        if first in PACKAGES:
            if not _resolves(ROOT / PACKAGES[first], rest):
                yield dotted[0]
        elif (members := class_members().get(first)) is not None and rest[0] not in members:
            yield dotted[0]


def _resolves(folder: Path, names: list[str]) -> bool:
    """Whether ``names`` lead from a package to a module, or to something that it has, or to a member of its class."""
    module = folder / "__init__.py"
    while names and module.name == "__init__.py":
        name, below = names[0], module.parent / names[0]
        if below.is_dir() and (below / "__init__.py").is_file():
            module = below / "__init__.py"
        elif below.with_suffix(".py").is_file() or below.with_suffix(".pyi").is_file():
            # A function may have its module's name: `ssd_kernels.info`.
            if len(names) == 1 or name not in names_in(module):
                module = below.with_suffix(".py" if below.with_suffix(".py").is_file() else ".pyi")
            else:
                break
        else:
            break
        names = names[1:]
    if not names:
        return True
    node = names_in(module).get(names[0])
    if isinstance(node, ast.ClassDef) and len(names) > 1 and not node.bases:
        return names[1] in set(members_of(node))
    return node is not None


CHECKS = {"paths": wrong_paths, "commands": wrong_commands, "names": wrong_names}


@pytest.mark.parametrize("check", CHECKS)
def test_every_reference_exists(check: str) -> None:
    wrong = [f"{file.relative_to(ROOT)}: {reference}" for file in sources()
             for reference in CHECKS[check](file, file.read_text())]
    assert not wrong, "\n".join(wrong)


def test_nothing_points_outside_the_repository() -> None:
    """The specification lies in docs/; nothing speaks of a page that is not here."""
    assert not [file for file in sources() if re.search(rf"\b{'SP'}EC\b", file.read_text())]


@pytest.mark.parametrize(("check", "name", "text"), [
    ("paths", "a.py", '"""See docs/specification.md, section 3.99."""'),
    ("paths", "a.h", "// as docs/specification.md,\n// sections 3 and 9 say"),
    ("paths", "a.py", "# the twin of csrc/common/layouts.h"),
    ("paths", "a.py", "# ssd_shapes/detectors.py knows"),
    ("paths", "docs/a.md", "`tests/kernels/test_nothing*.py`"),
    ("paths", "docs/a.md", "[backends](backend.md)"),
    ("paths", "docs/a.md", "[backends](backends.md#nowhere)"),
    ("paths", "docs/a.md", '<img src="sheet.png">'),
    ("paths", "docs/specification.md", "- as 3.98 says"),
    ("commands", "a.py", '"""`make nothing` does it."""'),
    ("commands", "a.md", "```\nmake nothing   # does it\n```"),
    ("commands", "pyproject.toml", "left out (make nothing)"),
    ("commands", "a.md", "`ssd-janus paint`"),
    ("commands", "a.md", "```\nssd-janus generate --colour red\n```"),
    ("commands", "a.md", "`ssd-bench step\n--colour`"),
    ("names", "a.py", '"""`ssd_kernels.nothing`"""'),
    ("names", "a.py", '"""`ssd_kernels.layout.LayerLayout.nothing`"""'),
    ("names", "a.py", '"""`ssd_janus.engine.nothing(1)`"""'),
    ("names", "a.py", '"""`LayerLayout.nothing`"""'),
])
def test_wrong_references_are_found(check: str, name: str, text: str) -> None:
    assert list(CHECKS[check](ROOT / name, text)), text
