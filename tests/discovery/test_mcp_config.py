"""The `mcpServers` file: what is read, what is refused, and what is never shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toolfleet.services.discovery.mcp_config import load_mcp_config
from toolfleet.services.discovery.models import DiscoveryError, McpServer

SECRET = "s3cr3t"


def write(tmp_path: Path, servers: object) -> Path:
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": servers}))
    return path


def test_both_forms_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "web": {"type": "http", "url": "https://host/mcp", "headers": {"Authorization": "Bearer x"}},
            "time": {"command": "mcp-server-time", "args": ["--local-timezone", "UTC"], "env": {"A": "1"}},
        },
    )
    assert load_mcp_config(path, {}) == [
        McpServer(name="web", url="https://host/mcp", headers={"Authorization": "Bearer x"}),
        McpServer(name="time", command="mcp-server-time", args=("--local-timezone", "UTC"), env={"A": "1"}),
    ]


def test_fields_of_other_clients_are_tolerated_as_they_stand(tmp_path: Path) -> None:
    entry = {"command": "c", "transport": "stdio", "autoApprove": ["a"], "timeout": 60, "envFile": "${workspaceFolder}"}
    assert load_mcp_config(write(tmp_path, {"a": entry}), {}) == [McpServer(name="a", command="c")]


def test_a_disabled_server_is_skipped_even_half_written(tmp_path: Path) -> None:
    assert load_mcp_config(write(tmp_path, {"a": {"disabled": True, "args": "${MISSING}"}}), {}) == []


def test_a_relative_folder_is_relative_to_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": {"command": "c", "cwd": "tools"}, "b": {"command": "c", "cwd": "/srv"}})
    assert [server.cwd for server in load_mcp_config(path, {})] == [str(tmp_path / "tools"), "/srv"]


def test_variables_come_from_the_caller_and_never_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "from the environment")
    monkeypatch.setenv("OTHER", "from the environment")
    path = write(
        tmp_path,
        {
            "a": {
                "command": "c",
                "args": ["${TOKEN}", "x-${NONE:-default}", "$${TOKEN}", "$TOKEN"],
                "env": {"K": "${TOKEN}"},
            }
        },
    )
    (server,) = load_mcp_config(path, {"TOKEN": SECRET})
    assert server.args == (SECRET, "x-default", "${TOKEN}", "$TOKEN")
    assert server.env == {"K": SECRET}
    unknown = write(tmp_path, {"a": {"url": "http://host/mcp", "headers": {"X": "${OTHER}"}}})
    with pytest.raises(
        DiscoveryError, match=r"mcp\.json: server 'a', headers\.X: \$\{OTHER\} is not known.*MCP_VARIABLES"
    ):
        load_mcp_config(unknown, {"TOKEN": SECRET})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "either a 'url' or a 'command'"),
        ({"url": "http://host/mcp", "command": "c"}, "either a 'url' or a 'command'"),
        ({"url": "ws://host/mcp"}, "url: "),
        ({"command": ""}, "command: "),
        ({"command": "c", "args": [1]}, "args.0: "),
        ({"command": "c", "env": {"KEY": {"nested": SECRET}}}, "env.KEY: "),
        ({"url": "http://host/mcp", "headers": [SECRET]}, "headers: "),
        ("c", "entry: "),
    ],
)
def test_a_wrong_entry_is_named_by_file_server_and_field(tmp_path: Path, entry: object, said: str) -> None:
    with pytest.raises(DiscoveryError) as caught:
        load_mcp_config(write(tmp_path, {"mine": entry}), {})
    message = str(caught.value)
    assert f"{tmp_path / 'mcp.json'}: server 'mine'" in message
    assert said in message
    assert SECRET not in message


@pytest.mark.parametrize("name", ["", "a/b"])
def test_a_name_that_makes_tool_names_ambiguous_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DiscoveryError, match="has no '/'"):
        load_mcp_config(write(tmp_path, {name: {"command": "c"}}), {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"mcpServers": {,}}', "not JSON: .* line 1"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", 'no object "mcpServers"'),
        (b'{"servers": {}}', 'no object "mcpServers"'),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "mcp.json"
    path.write_bytes(content)
    with pytest.raises(DiscoveryError, match=said):
        load_mcp_config(path, {})


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match="cannot be read: No such file"):
        load_mcp_config(tmp_path / "none.json", {})


def test_no_secret_is_in_the_repr() -> None:
    by_url = McpServer(
        name="web", url=f"https://user:{SECRET}@host:81/mcp?key={SECRET}", headers={"Authorization": SECRET}
    )
    by_command = McpServer(name="time", command="serve", args=("--key", SECRET), env={"KEY": SECRET})
    assert repr(by_url) == "McpServer('web', https://host:81/mcp)"
    assert repr(by_command) == "McpServer('time', serve)"
