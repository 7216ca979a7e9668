"""Settings: their page, their names, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.support.settings_doc import render
from toolfleet.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "SETTINGS.md").read_text(encoding="utf-8") == render(), "run `make docs`"


def test_every_setting_says_what_it_does() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_delays_are_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLFLEET_RETRY_DELAYS", "1, 2.5,60")
    assert Settings().retry_delays == (1.0, 2.5, 60.0)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TOOLFLEET_RETRY_DELAYS", "soon"),
        ("TOOLFLEET_LEASE", "0"),
        ("TOOLFLEET_RESULT_TTL_HOURS", "1"),
        ("TOOLFLEET_TOOL_POLICY", '{"web_crawl": "sometimes"}'),
    ],
)
def test_a_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError):
        Settings()


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URL", "nats://user:hunter2@host:4222")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "hunter2")
    assert "hunter2" not in repr(Settings())
