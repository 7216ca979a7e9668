"""Which tools may run twice."""

from __future__ import annotations

import pytest

from toolfleet.services.tool_execution.policy import Policy, is_repeatable


@pytest.mark.parametrize(
    ("annotations", "repeatable"),
    [
        ({}, False),
        ({"readOnlyHint": True}, True),
        ({"idempotentHint": True}, True),
        ({"idempotentHint": True, "destructiveHint": True}, True),
        ({"destructiveHint": False}, False),
        ({"readOnlyHint": False, "idempotentHint": False}, False),
        ({"readOnlyHint": "yes"}, False),
    ],
)
def test_the_annotations_decide(annotations: dict[str, object], repeatable: bool) -> None:
    assert is_repeatable("web", "crawl", annotations, {}) is repeatable


@pytest.mark.parametrize(
    ("overrides", "repeatable"),
    [
        ({"web/*": "repeatable"}, True),
        ({"web/*": "repeatable", "crawl": "once"}, False),
        ({"web/*": "once", "crawl": "once", "web/crawl": "repeatable"}, True),
        ({"other/*": "repeatable", "other/crawl": "repeatable"}, False),
    ],
)
def test_the_most_specific_override_decides(overrides: dict[str, Policy], repeatable: bool) -> None:
    assert is_repeatable("web", "crawl", {}, overrides) is repeatable


def test_an_override_can_forbid_what_a_tool_allows() -> None:
    assert not is_repeatable("web", "crawl", {"readOnlyHint": True}, {"crawl": "once"})
