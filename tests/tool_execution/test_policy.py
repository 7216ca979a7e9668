"""Which tools may run twice, and who says so."""

from __future__ import annotations

import pytest

from toolfleet.services.tool_execution.policy import Policy, policy_of, unused_overrides


@pytest.mark.parametrize(
    ("annotations", "repeatable", "source"),
    [
        ({}, False, "default"),
        ({"title": "Crawl", "openWorldHint": True}, False, "default"),
        ({"readOnlyHint": True}, True, "annotation"),
        ({"idempotentHint": True}, True, "annotation"),
        ({"idempotentHint": True, "destructiveHint": True}, True, "annotation"),
        ({"destructiveHint": False, "openWorldHint": False}, False, "default"),
        ({"readOnlyHint": False, "idempotentHint": False}, False, "annotation"),
        ({"readOnlyHint": None}, False, "default"),
        ({"readOnlyHint": "yes"}, False, "default"),
    ],
)
def test_the_annotations_decide(annotations: dict[str, object], repeatable: bool, source: str) -> None:
    assert policy_of("web", "crawl", annotations, {}) == (repeatable, source)


@pytest.mark.parametrize(
    ("overrides", "repeatable", "source"),
    [
        ({"web/*": "repeatable"}, True, "setting"),
        ({"web/*": "repeatable", "crawl": "once"}, False, "setting"),
        ({"web/*": "once", "crawl": "once", "web/crawl": "repeatable"}, True, "setting"),
        ({"other/*": "repeatable", "other/crawl": "repeatable"}, False, "default"),
    ],
)
def test_the_most_specific_override_decides(overrides: dict[str, Policy], repeatable: bool, source: str) -> None:
    assert policy_of("web", "crawl", {}, overrides) == (repeatable, source)


@pytest.mark.promise("G5")
@pytest.mark.parametrize("entry", ["crawl", "web/crawl", "web/*"])
@pytest.mark.parametrize("hint", ["readOnlyHint", "idempotentHint"])
def test_an_override_can_forbid_what_a_tool_allows(entry: str, hint: str) -> None:
    assert policy_of("web", "crawl", {hint: True}, {entry: "once"}) == (False, "setting")


def test_an_entry_that_names_nothing_is_told_with_what_is_near() -> None:
    tools = {"web": ["crawl", "search"], "shop": ["order"]}
    overrides: dict[str, Policy] = {
        "web/crawl": "once", "search": "once", "shop/*": "once",
        "web/crwl": "once", "ordr": "once", "shpo/*": "once",
    }  # fmt: skip
    told = unused_overrides(overrides, tools, ())
    assert [text.split("'")[1] for text in told] == ["ordr", "shpo/*", "web/crwl"]
    assert "near: order" in told[0]
    assert "shop/*" in told[1]
    assert "web/crawl" in told[2]


def test_what_may_be_a_tool_of_a_server_that_was_not_reached_is_not_told() -> None:
    overrides: dict[str, Policy] = {"shop/order": "once", "shop/*": "once", "order": "once", "web/order": "once"}
    assert [text.split("'")[1] for text in unused_overrides(overrides, {"web": ["crawl"]}, ["shop"])] == ["web/order"]
