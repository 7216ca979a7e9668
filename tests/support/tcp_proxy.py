"""A TCP proxy between a program and its server that a test can cut, slow down and reset.

Where a network drops packets, TCP neither fails nor delivers: bytes wait on the sending side, and connections stay
open for minutes. A stopped server looks alike from afar, but only a proxy makes one direction fail alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

CHUNK = 64 * 1024
"""Bytes read at once; what a direction holds back beyond it, and beyond the buffers of two sockets, is not read."""

_BACKLOG = 512
_ESTABLISHED = 1
"""The first byte of Linux's `TCP_INFO` for a connection that neither side has closed."""


class TcpProxy:
    """Listens on a free port of 127.0.0.1, the same for its whole life, and passes on to one server.

        async with TcpProxy("127.0.0.1", server.port) as proxy:
            client = connect(proxy.host, proxy.port)
            proxy.cut(to_server=False)  # the server hears us, we don't hear it

    The methods that change the weather act at once, on all connections and on those to come. The server need not be
    there: a connection that can't be passed on is reset.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        """
        Args:
            host: the server's.
            port: the server's; it is looked up at every new connection.
            seed: of jitter, stalls and resets.
        """
        self.host = "127.0.0.1"
        self.port = 0
        """Where the proxy listens, once it is entered."""
        self.accepted = 0
        """Connections so far."""
        self.resets = 0
        """Connections reset so far, by `reset_all` and `lossy`."""
        self._target = (host, port)
        self._random = random.Random(seed)
        self._to_server = _Direction()
        self._to_client = _Direction()
        self._weather = _Weather()
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server((self.host, 0), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._keep(self._accept(), "tcp proxy")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    @property
    def connections(self) -> int:
        """Connections that are passed on at present."""
        return len(self._links)

    def cut(self, to_server: bool = True, to_client: bool = True) -> None:
        """Lets nothing pass in the directions named, and everything in the other one.

        Connections stay open, also where one side has closed: its FIN or RST is held back like its bytes. New ones
        are completed by the kernel, as no proxy can drop a SYN, and hang without a byte until `heal`. Those whose
        client has given up by then never reach the server.
        """
        self._to_server.set_open(not to_server)
        self._to_client.set_open(not to_client)

    def heal(self) -> None:
        """Ends a cut. What was held back flows on, in order, as TCP would send it again."""
        self._to_server.set_open(True)
        self._to_client.set_open(True)

    def strand(self) -> int:
        """Cuts the present connections for good, and lets new ones pass; how many there were.

        As where a firewall has forgotten them: nobody is told, bytes and ends go nowhere.
        """
        for link in self._links:
            link.strand()
        return len(self._links)

    def slow(self, latency_s: float, jitter_s: float = 0) -> None:
        """Delays every chunk, in each direction, by `latency_s` to `latency_s + jitter_s` seconds. Order is kept.

        A chunk is what has gathered while the one before it waited, at most `CHUNK` bytes.
        """
        self._weather = replace(self._weather, latency_s=latency_s, jitter_s=jitter_s)

    def lossy(self, stall_chance: float = 0.1, stall_s: float = 0.3, reset_chance: float = 0.0) -> None:
        """Loses packets as TCP shows it: some chunks wait up to `stall_s` seconds more, some end their connection.

        Args:
            stall_chance: of each chunk to wait; TCP's first retransmission takes 0.2 to 1 s.
            stall_s: the longest wait.
            reset_chance: of each chunk to be lost with its connection.
        """
        self._weather = replace(self._weather, stall_chance=stall_chance, stall_s=stall_s, reset_chance=reset_chance)

    def normal(self) -> None:
        """Ends every cut, delay and loss."""
        self._weather = _Weather()
        self.heal()

    def reset_all(self) -> int:
        """Ends every connection with RST to both sides, also those that are cut; how many there were."""
        links = list(self._links)
        for link in links:
            link.reset()
        self.resets += len(links)
        return len(links)

    # -- what the connections ask ---------------------------------------------------------------------------------

    async def delay(self) -> None:
        """The present weather's, for one chunk."""
        weather, chance = self._weather, self._random.random
        seconds = weather.latency_s + chance() * weather.jitter_s
        if chance() < weather.stall_chance:
            seconds += chance() * weather.stall_s
        if seconds:
            await asyncio.sleep(seconds)

    def loses_a_connection(self) -> bool:
        lost = self._random.random() < self._weather.reset_chance
        self.resets += lost
        return lost

    # -- connections ----------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._listener)
            self._keep(self._serve(client), "tcp proxy connection")

    async def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(client.close)
            client.setblocking(False)
            if not (self._to_server.is_open and self._to_client.is_open):
                await self._to_server.passes()
                await self._to_client.passes()
                if not _established(client):
                    return
            try:
                server = await asyncio.open_connection(*self._target, limit=CHUNK)
            except OSError:
                _linger_not(client)
                return
            stack.callback(server[1].transport.abort)
            link = _Link(self, await asyncio.open_connection(sock=client, limit=CHUNK), server)
            stack.pop_all()
        self.accepted += 1
        self._links.add(link)
        try:
            await link.run(self._to_server, self._to_client)
        finally:
            self._links.discard(link)
            link.close()

    def _keep(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass(frozen=True, slots=True)
class _Weather:
    latency_s: float = 0.0
    jitter_s: float = 0.0
    stall_chance: float = 0.0
    stall_s: float = 0.0
    reset_chance: float = 0.0


class _Direction:
    """From one side to the other, for all connections."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self._opened.set()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def set_open(self, is_open: bool) -> None:
        if is_open:
            self._opened.set()
        else:
            self._opened.clear()

    async def passes(self) -> None:
        """Returns at once, or when the direction is open again."""
        while not self.is_open:
            await self._opened.wait()


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """One client's connection and the one to the server that belongs to it."""

    def __init__(self, proxy: TcpProxy, client: _Stream, server: _Stream) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._pumps: list[asyncio.Task[None]] = []
        self._stranded = False
        self._ended = asyncio.Event()

    async def run(self, to_server: _Direction, to_client: _Direction) -> None:
        """Passes bytes on until both sides have closed, or one has reset."""
        self._pumps = [
            asyncio.create_task(self._pump(self._client, self._server, to_server, to_client)),
            asyncio.create_task(self._pump(self._server, self._client, to_client, to_server)),
        ]
        try:
            await asyncio.gather(*self._pumps, return_exceptions=True)
            if self._stranded:
                await self._ended.wait()
        finally:
            for pump in self._pumps:
                pump.cancel()

    def strand(self) -> None:
        """Passes nothing on any more, and keeps both connections open."""
        self._stranded = True
        for pump in self._pumps:
            pump.cancel()

    def reset(self) -> None:
        """Ends both connections with RST."""
        self._ended.set()
        for _, writer in (self._client, self._server):
            _reset(writer)
        for pump in self._pumps:
            pump.cancel()

    def close(self) -> None:
        """Ends both connections; what was written is still sent."""
        for _, writer in (self._client, self._server):
            writer.close()

    async def _pump(self, source: _Stream, sink: _Stream, there: _Direction, back: _Direction) -> None:
        """One direction. It reads on only when the sink has taken the chunk before, so nothing piles up here."""
        (reader, answers), (_, writer) = source, sink
        while True:
            try:
                chunk = await reader.read(CHUNK)
            except ConnectionError:
                await there.passes()
                _reset(writer)
                return
            if self._proxy.loses_a_connection():
                self.reset()
                return
            await self._proxy.delay()
            await there.passes()
            try:
                if not chunk:
                    writer.write_eof()
                    return
                writer.write(chunk)
                await writer.drain()
            except (ConnectionError, OSError):
                # The sink has gone. Its RST takes the way back, which may be cut.
                await back.passes()
                _reset(answers)
                return


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        _linger_not(writer.get_extra_info("socket"))
    writer.transport.abort()


def _linger_not(connection: socket.socket) -> None:
    """Makes closing send RST and drop what was not sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _established(connection: socket.socket) -> bool:
    """Whether the peer has not closed, which can't be seen by reading past what it has sent before."""
    state: bytes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return state[0] == _ESTABLISHED
