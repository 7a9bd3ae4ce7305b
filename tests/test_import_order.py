"""Imports run one way, cli → api → rewrite → plan → axes → trace, and runtime imports none of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotp

PACKAGE = Path(next(iter(autotp.__path__)))

# What each part may import of the others. A part is a folder or a file of the package.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "report": set(),
    "runtime": {"errors"},
    "trace": {"errors"},
    "axes": {"trace", "errors"},
    "plan": {"axes", "trace", "errors", "report"},
    "rewrite": {"plan", "axes", "trace", "runtime", "errors"},
    "checkpoint": {"api", "carry", "newcomers", "prepare", "rewrite", "plan", "axes", "trace", "runtime", "errors"},
    "prepare": {"rewrite", "plan", "axes", "trace", "runtime", "errors"},
    "carry": {"prepare", "rewrite", "plan", "axes", "trace", "runtime", "errors"},
    "newcomers": {"carry", "prepare", "rewrite", "plan", "axes", "trace", "runtime", "errors"},
    "api": {"carry", "newcomers", "prepare", "rewrite", "plan", "axes", "trace", "runtime", "errors"},
    "debug": {"rewrite", "axes", "runtime", "errors"},
    "target": {"errors"},
    "cli": {"api", "checkpoint", "target", "report", "errors"},
    "__init__": {"api", "checkpoint", "debug", "rewrite", "plan", "axes", "runtime", "errors"},
    "__main__": {"cli"},
}


def part_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_parts(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and part of every import of autotp in ``source``, wherever it stands: inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from . import x: relative to the package that holds the module
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "autotp":
                yield node.lineno, rest.partition(".")[0] or "__init__"


def violations(package: Path) -> list[str]:
    """``plan/cut.py:7 imports rewrite`` for each import that runs the wrong way."""
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        part = part_of(path, package)
        module = ".".join(["autotp", *path.relative_to(package).with_suffix("").parts])
        if part not in MAY_IMPORT:
            found.append(f"{path.relative_to(package)}: a part that this test does not know")
            continue
        for line, other in imported_parts(path.read_text(), module):
            if other != part and other not in MAY_IMPORT[part]:
                found.append(f"{path.relative_to(package)}:{line} imports {other}")
    return found


def test_imports_run_one_way() -> None:
    assert violations(PACKAGE) == []


def test_the_order_itself_has_no_cycle() -> None:
    done: set[str] = set()
    while ready := {part for part, others in MAY_IMPORT.items() if part not in done and others <= done}:
        done |= ready
    assert done == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("file", "source", "said"),
    [
        ("trace/capture.py", "from autotp.axes import term", "trace/capture.py:1 imports axes"),
        ("axes/term.py", "import autotp.plan.planner", "axes/term.py:1 imports plan"),
        ("plan/cut.py", "\n\ndef f():\n    from autotp.rewrite import swap", "plan/cut.py:4 imports rewrite"),
        ("plan/cut.py", "from autotp import rewrite", "plan/cut.py:1 imports rewrite"),
        ("runtime/ops.py", "from autotp.plan.plan import Plan", "runtime/ops.py:1 imports plan"),
        ("runtime/ops.py", "from ..trace import graph", "runtime/ops.py:1 imports trace"),
        ("runtime/ops.py", "import autotp", "runtime/ops.py:1 imports __init__"),
        ("errors.py", "from . import report", "errors.py:1 imports report"),
        ("utils.py", "", "utils.py: a part that this test does not know"),
    ],
)
def test_the_test_can_fail(tmp_path: Path, file: str, source: str, said: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(source)
    assert violations(tmp_path) == [said]


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    (tmp_path / "rewrite").mkdir()
    (tmp_path / "rewrite" / "swap.py").write_text(
        "import torch\nfrom autotp.plan.plan import Plan\nfrom . import layout\nfrom .layout import runs\n"
        "from ..runtime.ops import gather\n"
    )
    assert violations(tmp_path) == []
