"""One door for all log lines, and no secret goes through it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from tests.conftest import SettingsFactory
from toolfleet.services.telemetry.logs import REDACTED, configure_logging, without_credentials

Configure = Callable[..., io.StringIO]


@pytest.fixture
def configure(make_settings: SettingsFactory) -> Iterator[Configure]:
    """Sets logging up on a buffer, and everything back afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def make(terminal: bool = False, **settings: Any) -> io.StringIO:
        buffer = io.StringIO()
        buffer.isatty = lambda: terminal  # type: ignore[method-assign]  # what decides about form and colours
        configure_logging(make_settings(**settings), buffer)
        return buffer

    yield make
    structlog.reset_defaults()
    root.handlers = handlers
    root.setLevel(level)


def logger() -> Any:
    return structlog.get_logger("toolfleet.test")


def lines(buffer: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in buffer.getvalue().splitlines()]


def test_json_lines_of_ours_and_of_libraries(configure: Configure) -> None:
    buffer = configure()
    logger().info("job.done", job_id="job_x", ms=5)
    logging.getLogger("some.library").warning("took %d s", 7)
    ours, theirs = lines(buffer)
    assert ours["event"] == "job.done"
    assert (ours["job_id"], ours["ms"], ours["level"], ours["logger"]) == ("job_x", 5, "info", "toolfleet.test")
    assert ours["timestamp"].endswith("Z")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("took 7 s", "warning", "some.library")


def test_a_level_holds_for_both(configure: Configure) -> None:
    buffer = configure(log_level="warning")
    logger().info("quiet")
    logging.getLogger("some.library").info("quiet")
    logger().warning("loud")
    assert [line["event"] for line in lines(buffer)] == ["loud"]


def test_libraries_that_tell_of_every_request_are_heard_at_debug_only(configure: Configure) -> None:
    buffer = configure()
    logging.getLogger("httpx").info("GET /")
    logging.getLogger("httpx").warning("odd")
    assert [line["event"] for line in lines(buffer)] == ["odd"]
    buffer = configure(log_level="debug")
    logging.getLogger("httpx").info("GET /")
    assert [line["event"] for line in lines(buffer)] == ["GET /"]


@pytest.mark.parametrize(
    ("settings", "terminal", "as_json", "colours"),
    [
        ({}, False, True, False),
        ({}, True, False, True),
        ({"no_color": "1"}, True, False, False),
        ({"log_format": "json"}, True, True, False),
        ({"log_format": "console"}, False, False, False),
    ],
)
def test_the_form_fits_where_it_goes(
    configure: Configure, settings: dict[str, str], terminal: bool, as_json: bool, colours: bool
) -> None:
    buffer = configure(terminal, **settings)
    logger().info("hello")
    text = buffer.getvalue()
    assert text.startswith("{") is as_json
    assert ("\x1b[" in text) is colours


def test_keys_with_the_name_of_a_secret_are_redacted_however_deep(configure: Configure) -> None:
    buffer = configure()
    logger().info(
        "call", api_key="k1", Authorization="k2", max_tokens=5, token=None,
        nested={"headers": [{"X-Auth-Token": "k3"}, {"set-cookie": ("k4",)}], "password_set": True},
    )  # fmt: skip
    logging.getLogger("some.library").warning("call", extra={"client_secret": "k5"})
    text = buffer.getvalue()
    assert not any(f"k{n}" in text for n in range(1, 6))
    ours = lines(buffer)[0]
    assert (ours["max_tokens"], ours["token"], ours["nested"]["password_set"]) == (5, None, True)
    assert ours["api_key"] == REDACTED


def test_credentials_inside_texts_and_exceptions_are_redacted(configure: Configure) -> None:
    buffer = configure()
    try:
        raise ConnectionError("no answer from redis://user:hunter2@host:6379/0")
    except ConnectionError as error:
        logger().error("lost", exc_info=error, url="nats://hunter2@host", error=error)
        logging.getLogger("some.library").exception("lost %s", "https://a:hunter2@host/")
    text = buffer.getvalue()
    assert "hunter2" not in text
    assert "Traceback" in lines(buffer)[0]["exception"]
    assert "host:6379/0" in text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("redis://:pw@h:1/0", "redis://[redacted]@h:1/0"),
        ("nats://a:b@h1,nats://c:d@h2", "nats://[redacted]@h1,nats://[redacted]@h2"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer [redacted]"),
        ("GET /x?page=2&api_key=abc&q=1", "GET /x?page=2&api_key=[redacted]&q=1"),
        ("http://host/a@b, mail me@host", "http://host/a@b, mail me@host"),
        ("basic auth is off", "basic auth is off"),
    ],
)
def test_only_credentials_are_taken_out(text: str, clean: str) -> None:
    assert without_credentials(text) == clean
