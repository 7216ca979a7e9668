"""Arguments against schemas: what is said, what is not said, and what may not take long."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolfleet.services.background_jobs.errors import InvalidArguments
from toolfleet.services.background_jobs.ports import ToolSpec
from toolfleet.services.tool_execution.schema_check import check_arguments

CRAWL = {
    "type": "object",
    "properties": {
        "urls": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "depth": {"type": "integer", "minimum": 0, "maximum": 5},
        "mode": {"enum": ["fast", "full"]},
        "auth": {"type": "object", "properties": {"token": {"type": "string", "maxLength": 8}}, "required": ["token"]},
        "code": {"type": "string", "pattern": "^[a-z]+$"},
    },
    "required": ["urls"],
    "additionalProperties": False,
}


def spec(schema: Any) -> ToolSpec:
    return ToolSpec(name="crawl", server="web", tool="crawl", input_schema=schema)


def refusal(schema: Any, arguments: dict[str, Any]) -> InvalidArguments:
    with pytest.raises(InvalidArguments) as caught:
        check_arguments(spec(schema), arguments)
    return caught.value


@pytest.mark.parametrize(
    ("arguments", "path", "message"),
    [
        ({}, "$.urls", "is missing"),
        ({"urls": [5]}, "$.urls[0]", "must be of type string"),
        ({"urls": []}, "$.urls", "violates 'minItems: 1' of the schema"),
        ({"urls": ["a"], "depth": 9}, "$.depth", "violates 'maximum: 5' of the schema"),
        ({"urls": ["a"], "mode": "odd"}, "$.mode", "must be one of 'fast', 'full'"),
        ({"urls": ["a"], "auth": {}}, "$.auth.token", "is missing"),
        ({"urls": ["a"], "auth": {"token": "s3cret-s3cret"}}, "$.auth.token", "violates 'maxLength: 8' of the schema"),
        ({"urls": ["a"], "code": "S3CRET"}, "$.code", "must match the pattern '^[a-z]+$'"),
        ({"urls": ["a"], "colour": "s3cret"}, "$", "has unknown properties: 'colour'"),
    ],
)
def test_the_path_and_the_reason_are_said_and_no_value(arguments: dict[str, Any], path: str, message: str) -> None:
    error = refusal(CRAWL, arguments)

    assert error.details["path"] == path
    assert error.details["errors"][0] == {"path": path, "message": message}
    assert str(error) == f"the arguments of 'crawl' do not fit its schema: {path} {message}"
    assert "s3cret" not in (str(error) + json.dumps(error.details)).lower()


def test_what_fits_passes() -> None:
    check_arguments(spec(CRAWL), {"urls": ["http://x"], "depth": 1, "mode": "fast", "auth": {"token": "t"}})
    check_arguments(spec({}), {"anything": 1})


def test_at_most_ten_errors_are_listed() -> None:
    assert len(refusal(CRAWL, {"urls": list(range(100))}).details["errors"]) == 10


def test_the_schemas_own_draft_counts() -> None:
    draft_7 = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "properties": {"pair": {"items": [{"type": "string"}]}},
    }
    current = {"properties": {"pair": {"prefixItems": [{"type": "string"}]}}}

    for schema in (draft_7, current):
        assert refusal(schema, {"pair": [1]}).details["path"] == "$.pair[0]"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "no-such-type"},
        {"properties": 5},
        {"properties": {"a": {"pattern": "("}}},
        {"properties": {"a": {"pattern": "a{99999999999}"}}},
        {"$ref": "#/$defs/gone"},
        {"$ref": "http://127.0.0.1:1/schema.json"},
        {"$ref": "#"},
        {"properties": {"a": {"$ref": "file:///etc/passwd"}}},
    ],
)
def test_a_broken_schema_leaves_the_decision_to_the_server(schema: dict[str, Any]) -> None:
    check_arguments(spec(schema), {"a": "x"})


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", [
        "^(a+)+$", "^(a|a)*$", "^(a{1,}b?)+$", "(x+x+)+y", "^([a-z]+)*$", "^a*a*a*a*a*a*a*a*a*a*a*a*b$", "^((a)+)+$",
        "^((a+),?)+$", "^" + "a?" * 40 + "a" * 40 + "!$", "^" + "(a|a)" * 40 + "b", "^(?:(?:a){0,60}){0,60}b",
        "a*a*b", r"^(a*)\1*\1*b", "^(?=(a+))*b", "((((){1000}){1000}){1000}){1000}b", "^a{0,999}a{0,999}a{0,999}b",
    ],
)  # fmt: skip
def test_no_pattern_runs_for_ever(pattern: str) -> None:
    evil = "a" * 5000 + "x" * 5000 + "!"

    check_arguments(spec({"properties": {"a": {"pattern": pattern, "type": "string"}}}), {"a": evil})
    check_arguments(spec({"patternProperties": {pattern: {"type": "string"}}}), {evil: 1})
    check_arguments(spec({"patternProperties": {pattern: {}}, "additionalProperties": False}), {evil: 1})
    check_arguments(spec({"patternProperties": {pattern: {}}, "unevaluatedProperties": False}), {evil: 1})
    check_arguments(spec({"propertyNames": {"pattern": pattern}}), {evil: 1, "a" * 400: 2})
    assert refusal({"properties": {"pattern": {"pattern": pattern, "type": "string"}}}, {"pattern": 1})


@pytest.mark.parametrize(
    ("pattern", "fits", "fails"),
    [
        (r"^\s*[Hh][Tt][Tt][Pp][Ss]?://", "https://" + "x" * 8000, "ftp://" + "x" * 8000),
        ("^[a-z]+$", "a" * 50_000, "a" * 50_000 + "!"),
        (r"^[^@\s]+@[^@\s]+\.[^@\s]+$", "me@example.org", "me at example.org"),
        ("^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", "0" * 8 + "-0000" * 3 + "-" + "0" * 12, "0" * 36),
        (r"^(\d{1,3}\.){3}\d{1,3}$", "127.0.0.1", "127.0.0"),
        ("^(fast|full)$", "full", "other"),
        ("b[]x]{2}", "ab]x", "ab]"),
        ("^(?:a|b){,2}$", "ab", "abb"),
    ],
)
def test_harmless_patterns_are_checked(pattern: str, fits: str, fails: str) -> None:
    schema = {"properties": {"a": {"pattern": pattern}}}
    named = {"patternProperties": {pattern: {"type": "integer"}}, "additionalProperties": False}

    check_arguments(spec(schema), {"a": fits})
    assert refusal(schema, {"a": fails}).details["path"] == "$.a"
    check_arguments(spec(named), {fits: 1})
    assert refusal(named, {fits: "text"})
    assert "unknown properties" in refusal(named, {fails: 1}).details["errors"][0]["message"]


@pytest.mark.timeout(20)
def test_many_strings_share_one_bound_of_time() -> None:
    schema = {"properties": {"a": {"items": {"pattern": "^(?!a*b)"}}}}

    check_arguments(spec(schema), {"a": ["c" + "a" * 1_000_000] * 20_000})
    schema = {"properties": {"a": {"items": {"pattern": "a*b|c"}}}}
    check_arguments(spec(schema), {"a": ["a" * 800 + "c"] * 20_000})


@pytest.mark.timeout(20)
def test_unique_items_take_linear_time() -> None:
    schema = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    items: list[Any] = [{"n": number} for number in range(50_000)]

    check_arguments(spec(schema), {"a": items})
    assert refusal(schema, {"a": [*items, {"n": 0}]}).details["errors"][0]["message"] == "has items that repeat"


@given(
    st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.booleans() | st.text(), st.lists, max_leaves=8))
)
def test_whatever_comes_is_accepted_or_refused(arguments: dict[str, Any]) -> None:
    paths = ["$"]
    try:
        check_arguments(spec(CRAWL), arguments)
    except InvalidArguments as error:
        paths = [entry["path"] for entry in error.details["errors"]]
    assert all(path.startswith("$") for path in paths)
