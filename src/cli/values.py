"""The arguments of a tool from the command line: ``key=value`` words, and JSON.

`key=value` is the JSON value where the text is JSON (``max_pages=5``, ``same_host=false``, ``tags='["a","b"]'``) and
the text itself where it is not (``url=https://example.org``, ``zip=00501``). A text that reads as JSON and is meant as
text is written as a JSON string: ``version='"5"'``. `key=@path` is the text of a file, and ``key='"@name"'`` a text
that begins with an @. `--args` takes a JSON object, ``@path`` a file with one, ``-`` standard input; single words
replace its fields.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, TextIO

from toolfleet.cli.exits import USAGE, CliError


def tool_arguments(words: Sequence[str], args: str | None, stdin: TextIO) -> dict[str, Any]:
    """The arguments of one call.

    Args:
        words: ``key=value``, each key once.
        args: a JSON object, ``@path`` or ``-``; None for none.
        stdin: read where something says ``-``.

    Raises:
        CliError: with exit code 2; the message says which word is wrong and how it is written.
    """
    arguments = _object(args, stdin) if args is not None else {}
    seen: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise _usage(f"'{word}' is not an argument; write key=value, or give JSON with --args")
        if key in seen:
            raise _usage(f"argument '{key}' is given twice; a list is written as JSON: {key}='[…]'")
        seen.add(key)
        arguments[key] = _read(text[1:], f"argument '{key}'") if text.startswith("@") else typed(text)
    return arguments


def typed(text: str) -> Any:
    """The JSON value that a text is, or the text."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return text
    # 1e999 parses, to a number that JSON has no word for.
    return text if isinstance(value, float) and not math.isfinite(value) else value


def json_value(text: str, option: str, stdin: TextIO) -> Any:
    """The JSON that an option holds, names as ``@path`` or sends for with ``-``.

    Raises:
        CliError: with exit code 2; it is not JSON, or the file can't be read.
    """
    if text == "-":
        text = stdin.read()
    elif text.startswith("@"):
        text = _read(text[1:], option)
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise _usage(f"{option} is not JSON: {error}") from None


def _object(args: str, stdin: TextIO) -> dict[str, Any]:
    value = json_value(args, "--args", stdin)
    if not isinstance(value, dict):
        raise _usage('--args is not a JSON object; it looks like {"key": "value"}')
    return value


def _read(path: str, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise _usage(f"{what}: {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _usage(f"{what}: {path} is not UTF-8 text") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _usage(message: str) -> CliError:
    return CliError(message, USAGE)


_AGO = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def moment(text: str | None, option: str) -> str | None:
    """A time for the API (RFC 3339): ``90s``, ``15m``, ``2h`` or ``3d`` ago, or the time itself with its zone.

    Raises:
        CliError: with exit code 2; it is neither.
    """
    if text is None:
        return None
    if found := _AGO.fullmatch(text):
        age = timedelta(seconds=float(found[1]) * _SECONDS[found[2]])
        return (datetime.now(UTC) - age).isoformat()
    try:
        told = datetime.fromisoformat(text)
    except ValueError:
        told = None
    if told is None or told.tzinfo is None:
        raise _usage(f"{option} '{text}' is no time; write 90s, 15m, 2h or 3d, or a time such as 2030-01-01T12:00:00Z")
    return told.isoformat()
