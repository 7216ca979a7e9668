"""A Consul agent for development and tests, from the `consul` program where one is installed."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from toolfleet.services.embedded.errors import ServerNotInstalled
from toolfleet.services.embedded.server import HOST, EmbeddedServer

_PROGRAM = "consul"
_CONFIG = "consul.json"


class EmbeddedConsul(EmbeddedServer):
    """A single Consul agent in dev mode on loopback. It keeps its catalogue in memory: a restart forgets it."""

    name: ClassVar[str] = _PROGRAM
    picked_ports: ClassVar[int] = 3
    """HTTP, gossip and consensus."""

    def __init__(self, data_dir: Path, *, token: str | None = None, start_timeout: float = 30.0) -> None:
        """
        Args:
            data_dir: for configuration and log.
            token: deny everything to clients that do not send this ACL token (a UUID); None leaves ACLs off.
            start_timeout: seconds until an agent that has elected no leader is given up.
        """
        super().__init__(data_dir, start_timeout=start_timeout)
        self._token = token

    @property
    def address(self) -> str:
        """``host:port`` of the HTTP API, as CONSUL_HTTP_ADDR takes it."""
        return f"{HOST}:{self.port}"

    def _prepare(self) -> list[str]:
        program = find_consul()
        (self.data_dir / _CONFIG).write_text(json.dumps(self._config()))
        return [program, "agent", "-dev", "-config-file", _CONFIG]

    def _config(self) -> dict[str, object]:
        http, serf, server = self._ports
        unused = {"dns": -1, "https": -1, "grpc": -1, "serf_wan": -1}
        config: dict[str, object] = {
            "bind_addr": HOST,
            "client_addr": HOST,
            "node_name": "toolfleet-embedded",
            "ports": {"http": http, "serf_lan": serf, "server": server, **unused},
            "disable_update_check": True,
            "log_level": "info",
        }
        if self._token is not None:
            config["acl"] = {"enabled": True, "default_policy": "deny", "tokens": {"master": self._token}}
        return config

    async def _answers(self, pid: int) -> bool:
        # Until a leader is elected the catalogue refuses reads and writes; this path needs no token.
        reader, writer = await asyncio.open_connection(HOST, self.port)
        with closing(writer):
            writer.write(f"GET /v1/status/leader HTTP/1.0\r\nHost: {HOST}\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        leader = f'"{HOST}:{self._ports[2]}"'.encode()
        return b" 200 " in head.splitlines()[0] and body.strip() == leader


def find_consul() -> str:
    """The path of the `consul` program.

    Raises:
        ServerNotInstalled: there is none on PATH.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        raise ServerNotInstalled(
            "the program 'consul' is not on PATH. On Debian, as root: make consul; elsewhere install a Consul agent"
        )
    return program
