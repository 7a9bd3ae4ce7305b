"""docs/rules.md says what is so: its code runs from top to bottom, and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotp
from tests.dist.pool import Pool

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "rules.md"
_BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n(?P<printed>(?:    [^\n]*\n)+))?", re.DOTALL)
_NUMBER = re.compile(r"(?<=off by )[\d.e-]+|(?<=element is )[\d.e-]+")


def words(text: str) -> str:
    """However the lines are broken; numbers of random examples left out."""
    return _NUMBER.sub("#", " ".join(text.split()))


@pytest.fixture
def _forget() -> Iterator[None]:
    yield
    for name in ("attention", "head_norm", "normalize"):
        with contextlib.suppress(autotp.RuleError):
            autotp.unregister_rule(f"mylib::{name}")


@pytest.mark.usefixtures("_forget")
def test_the_code_runs_and_prints_what_it_says() -> None:
    blocks = list(_BLOCK.finditer(PAGE.read_text()))
    assert len(blocks) == 4
    namespace: dict[str, object] = {"__name__": "rules_page"}
    for number, block in enumerate(blocks):
        code = compile(
            "\n" * PAGE.read_text()[: block.start("code")].count("\n") + block["code"], str(PAGE), "exec"
        )
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        assert words(printed.getvalue()) == words(block["printed"] or ""), f"block {number}"


def test_every_function_and_option_is_there() -> None:
    import inspect

    text = PAGE.read_text()
    for function in (autotp.register_rule, autotp.check_rule):
        for option in inspect.signature(function).parameters:
            assert re.search(rf"\b{option}\b", text), option
    for name in re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE):
        for method in re.findall(r"\b(\w+)\(", name):
            assert hasattr(autotp.OpContext, method) or method in ("split", "cut"), method


def _example() -> bool:
    sys.path.insert(0, str(ROOT / "examples"))
    import custom_op

    with contextlib.redirect_stdout(io.StringIO()):
        return bool(custom_op.main())


def test_the_example_agrees(dist: Pool) -> None:
    assert dist.run(2, _example) == [True, True]
