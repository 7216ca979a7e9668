"""Logs of a whole process: structlog's events and the libraries' records leave by one door, without secrets.

They go to stderr: JSON lines where a machine reads them, columns on a terminal. Whatever a key with the name of a
secret holds, and credentials inside texts, exceptions included, are replaced before a line is made of them.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, TextIO

import structlog
from structlog.typing import Processor

from toolfleet.settings import Settings

REDACTED: Final = "[redacted]"

_SECRET_NAME: Final = re.compile(
    r"secret|token(?!s)|passw|pwd|authorization|api[_-]?key|private[_-]?key|credential|cookie", re.IGNORECASE
)
"""`tokens` is left out: a count of them is no secret."""

_IN_TEXT: Final = (
    # scheme://user:password@host, also with the user or the password alone.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@", re.IGNORECASE), rf"\1{REDACTED}@"),
    (re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE), rf"\1 {REDACTED}"),
    (
        re.compile(r"([?&][^=&\s]*(?:secret|token|passw|key|signature)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE),
        rf"\1{REDACTED}",
    ),
)

_MAX_DEPTH: Final = 8
"""Of nested values that are looked through; deeper ones are replaced whole."""

_QUIET: Final = ("asyncio", "httpcore", "httpx", "mcp", "nats", "trafilatura", "uvicorn.access")
"""Libraries that tell of every request at a level that people read; below `debug` only their warnings count."""


def configure_logging(settings: Settings, stream: TextIO | None = None) -> None:
    """Set up logging for this process, from `log_level`, `log_format` and `no_color`. Safe to repeat.

    Args:
        settings: where the three come from.
        stream: where lines go, instead of stderr.
    """
    target = sys.stderr if stream is None else stream
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    on_terminal = target.isatty()
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not on_terminal)
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _without_color_message,
                structlog.processors.StackInfoRenderer(),
                structlog.processors.format_exc_info,
                redact,
                _renderer(as_json=as_json, colors=on_terminal and not settings.no_color),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))


def _renderer(*, as_json: bool, colors: bool) -> Processor:
    if as_json:
        return structlog.processors.JSONRenderer()
    return structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)


def _without_color_message(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """uvicorn sends each message twice, the second time with colours."""
    event.pop("color_message", None)
    return event


def redact(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor that takes secrets out of an event, in keys, in texts and in nested values."""
    for key, value in event.items():
        event[key] = _clean(key, value, 0)
    return event


def _clean(name: object, value: Any, depth: int) -> Any:
    if isinstance(name, str) and _SECRET_NAME.search(name) and value is not None and not isinstance(value, bool):
        return REDACTED
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, (int, float)) or value is None:
        return value
    if depth >= _MAX_DEPTH:
        return REDACTED
    if isinstance(value, Mapping):
        return {key: _clean(key, item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_clean(None, item, depth + 1) for item in value]
    # Anything else becomes text in the line anyway: an exception, a path, a URL object.
    return without_credentials(str(value))


def without_credentials(text: str) -> str:
    """A text without the credentials that URLs, query strings and Authorization values in it carry."""
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text
