"""Every promise of docs/GUARANTEES.md has a test, and every test that claims one claims one that is there."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DOCUMENT = (ROOT / "docs" / "GUARANTEES.md").read_text(encoding="utf-8")

SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL))
PROMISES = [f"G{number}" for number in range(1, 13)]


def claims() -> dict[str, set[str]]:
    """By promise, ``path::test`` of every test that carries it. Read from the source, so that no test is missed because
    it was not selected or can't be imported here."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for promise in filter(None, map(promise_of, node.decorator_list)):
                    assert node.name.startswith("test_"), f"{path}: {node.name} is no test and claims {promise}"
                    found[promise].add(f"{path.relative_to(ROOT).as_posix()}::{node.name}")
    return dict(found)


def promise_of(decorator: ast.expr) -> str | None:
    """The id in ``@pytest.mark.promise("G1")``."""
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.promise":
        (argument,) = decorator.args
        return str(ast.literal_eval(argument))
    return None


CLAIMS = claims()


def test_the_promises_are_listed_in_order() -> None:
    assert list(SECTIONS) == PROMISES


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_has_a_test(promise: str) -> None:
    assert CLAIMS.get(promise), f"no test carries @pytest.mark.promise({promise!r})"


@pytest.mark.parametrize("promise", PROMISES)
def test_the_tests_named_for_a_promise_are_there_and_carry_it(promise: str) -> None:
    named = set(re.findall(r"^- `(tests/\S+::\w+)`$", SECTIONS[promise], re.MULTILINE))
    assert named, f"{promise} names no test"
    assert named <= CLAIMS[promise], f"gone, renamed or without the mark: {named - CLAIMS[promise]}"
    assert len(named) == SECTIONS[promise].count("\n- "), f"{promise} has a line that names no test"


def test_no_test_claims_what_is_not_promised() -> None:
    assert set(CLAIMS) <= set(PROMISES)
