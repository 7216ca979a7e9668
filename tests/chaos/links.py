"""All links of a fleet, in a process of their own: a driver that is busy must not be a slow network.

    python -m tests.chaos.links PORT…       one link to each port of 127.0.0.1

It writes the ports that it listens on, as JSON, and then does what it is told, one JSON list a line:
``[number, method, {arguments}]`` calls a method of the `TcpProxy` of that number. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import Any

from tests.support.tcp_proxy import TcpProxy

HOST = "127.0.0.1"


class Links:
    """The driver's side: links by name."""

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        """Where a member reaches its server."""
        self._numbers: dict[str, int] = {}
        self._process: asyncio.subprocess.Process | None = None

    async def open(self, targets: dict[str, int]) -> None:
        """A link to each port, by name."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __spec__.name, *map(str, targets.values()),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        ports = json.loads(await self._process.stdout.readline())
        self.ports = dict(zip(targets, ports, strict=True))
        self._numbers = {name: number for number, name in enumerate(targets)}

    def tell(self, name: str, method: str, **arguments: Any) -> None:
        """Change the weather of a link; see `TcpProxy`."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([self._numbers[name], method, arguments]).encode() + b"\n")

    def clear(self) -> None:
        """All links as if nothing had been."""
        for name in self._numbers:
            self.tell(name, "normal")

    async def close(self) -> None:
        """Safe to repeat."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


async def main(ports: list[int]) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with contextlib.AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(TcpProxy(HOST, port)) for port in ports]
        print(json.dumps([proxy.port for proxy in proxies]), flush=True)
        while line := await commands.readline():
            number, method, arguments = json.loads(line)
            getattr(proxies[number], method)(**arguments)


if __name__ == "__main__":
    asyncio.run(main([int(port) for port in sys.argv[1:]]))
