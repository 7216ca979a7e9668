"""The `mcpServers` file that desktop clients and editors use, so that one file serves them and the fleet.

    {"mcpServers": {"time": {"command": "mcp-server-time", "args": ["--local-timezone", "UTC"], "env": {}, "cwd": "."},
                    "web": {"url": "https://host/mcp", "headers": {"Authorization": "Bearer ${WEB_TOKEN}"}},
                    "old": {"command": "...", "disabled": true}}}

- `type` and `transport` are not needed, and neither they nor fields of other clients' own are looked at.
- A relative `cwd` is relative to the file.
- ``${NAME}`` and ``${NAME:-default}`` in any text stand for a variable that the caller passes in. The environment is
  never looked at: a file from elsewhere must not be able to send its secrets to a server. ``$${`` is a plain ``${``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolfleet.services.discovery.models import DiscoveryError, McpServer

_VARIABLE = re.compile(r"\$(?P<escape>\$\{)|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    command: str | None = Field(None, min_length=1)
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = Field(None, pattern=r"^https?://[^/]")
    headers: dict[str, str] = {}
    disabled: bool = False


def load_mcp_config(path: Path, variables: Mapping[str, str]) -> list[McpServer]:
    """The servers of a file in the `mcpServers` form, in its order, without the disabled ones.

    Raises:
        DiscoveryError: the file cannot be read, is not in this form, or uses a variable that is not in `variables`;
            the message names the file, the server and the field, and shows no value.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DiscoveryError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise DiscoveryError(f"{path}: not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError:
        raise DiscoveryError(f"{path}: not JSON: it is not UTF-8 text") from None
    servers = content.get("mcpServers") if isinstance(content, dict) else None
    if not isinstance(servers, dict):
        raise DiscoveryError(f'{path}: no object "mcpServers"; the form is {{"mcpServers": {{"name": {{...}}}}}}')
    return [server for name, entry in servers.items() if (server := _server(name, entry, variables, path)) is not None]


def _server(name: str, content: object, variables: Mapping[str, str], path: Path) -> McpServer | None:
    try:
        # What is switched off may be half written: nothing else of it is looked at.
        if isinstance(content, dict) and content.get("disabled") is True:
            return None
        if isinstance(content, dict):
            content = {field: value for field, value in content.items() if field in _Entry.model_fields}
        entry = _Entry.model_validate(_expanded(content, variables, ()))
        return McpServer(
            name=name,
            url=entry.url,
            headers=entry.headers,
            command=entry.command,
            args=tuple(entry.args),
            env=entry.env,
            cwd=None if entry.cwd is None else str(path.absolute().parent / entry.cwd),
        )
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DiscoveryError(f"{path}: server {name!r}, {where or 'entry'}: {first['msg']}") from None
    except _UnknownVariable as error:
        raise DiscoveryError(
            f"{path}: server {name!r}, {error.field}: ${{{error.name}}} is not known; "
            f"add {error.name} to TOOLFLEET_MCP_VARIABLES"
        ) from None
    except ValueError as error:
        raise DiscoveryError(f"{path}: server {name!r}: {error}") from None


class _UnknownVariable(Exception):
    def __init__(self, name: str, field: str) -> None:
        self.name = name
        self.field = field


def _expanded(value: object, variables: Mapping[str, str], where: tuple[str, ...]) -> object:
    if isinstance(value, dict):
        return {key: _expanded(item, variables, (*where, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, variables, (*where, str(index))) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        if match["escape"]:
            return match["escape"]
        found = variables.get(match["name"], match["default"])
        if found is None:
            raise _UnknownVariable(match["name"], ".".join(where))
        return found

    return _VARIABLE.sub(replacement, value)
