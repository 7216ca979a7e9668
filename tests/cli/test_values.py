"""Words of the command line become arguments of a tool."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolfleet.cli.exits import USAGE, CliError
from toolfleet.cli.values import json_value, tool_arguments, typed

NO_INPUT = io.StringIO()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-1.5", -1.5),
        ("true", True),
        ("null", None),
        ('["a", 1]', ["a", 1]),
        ('"5"', "5"),
        ('"@name"', "@name"),
        ("", ""),
        ("https://example.org/?a=b", "https://example.org/?a=b"),
        # None of these is JSON, so they are what they look like: a zip code, words, unfinished brackets.
        ("00501", "00501"),
        ("True", "True"),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e999", "1e999"),
        ("[1", "[1"),
        ("a b", "a b"),
    ],
)
def test_a_value_is_json_where_it_is_json_and_text_where_not(text: str, value: Any) -> None:
    assert typed(text) == value
    assert type(typed(text)) is type(value)


@given(JSON)
def test_every_json_value_can_be_written(value: Any) -> None:
    assert tool_arguments([f"key={json.dumps(value)}"], None, NO_INPUT) == {"key": value}


@given(st.text())
def test_every_text_can_be_written(text: str) -> None:
    assert typed(json.dumps(text)) == text


def test_only_the_first_equals_sign_separates() -> None:
    assert tool_arguments(["query=a=b", "n:=5"], None, NO_INPUT) == {"query": "a=b", "n:": 5}


def test_a_file_gives_its_text_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "note"
    file.write_text("5\n")
    assert tool_arguments([f"text=@{file}"], None, NO_INPUT) == {"text": "5\n"}


def test_words_replace_fields_of_args(tmp_path: Path) -> None:
    file = tmp_path / "args.json"
    file.write_text('{"url": "a", "max_pages": 1}')
    assert tool_arguments(["max_pages=2"], f"@{file}", NO_INPUT) == {"url": "a", "max_pages": 2}
    assert tool_arguments(["max_pages=2"], "-", io.StringIO(file.read_text())) == {"url": "a", "max_pages": 2}
    assert tool_arguments([], '{"url": "b"}', NO_INPUT) == {"url": "b"}


@pytest.mark.parametrize(
    ("words", "args", "says"),
    [
        (["max_pages"], None, "'max_pages' is not an argument; write key=value"),
        (["=5"], None, "is not an argument"),
        (["a=1", "a=2"], None, "'a' is given twice"),
        (["a=@/nowhere/at/all"], None, "argument 'a': /nowhere/at/all can't be read: No such file"),
        ([], "[1]", "--args is not a JSON object"),
        ([], "{", "--args is not JSON"),
        ([], '{"a": NaN}', "NaN is not JSON"),
        ([], "@/nowhere/at/all", "can't be read"),
    ],
)
def test_what_is_wrong_is_said_as_a_usage_error(words: list[str], args: str | None, says: str) -> None:
    with pytest.raises(CliError) as caught:
        tool_arguments(words, args, NO_INPUT)
    assert says in str(caught.value)
    assert caught.value.code == USAGE


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(CliError, match="not UTF-8"):
        tool_arguments([f"a=@{file}"], None, NO_INPUT)


def test_an_option_may_hold_any_json() -> None:
    assert json_value("[1]", "--result", NO_INPUT) == [1]
    assert json_value("-", "--result", io.StringIO('"text"')) == "text"
