"""The proxy that other tests cut networks with: what it does to bytes and connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
BIG = 64 << 20


class Echo:
    """A server that sends back every line, and knows what it has heard."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.opened = 0
        self.lost: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            while line := await reader.readline():
                self.heard.append(line)
                writer.write(line)
                await writer.drain()
            self.lost.append("closed")
        except ConnectionResetError:
            self.lost.append("reset")
        finally:
            writer.close()


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[TcpProxy]:
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    async with server, TcpProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: TcpProxy) -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    yield reader, writer
    writer.close()


async def says(client: Stream, text: bytes) -> None:
    client[1].write(text + b"\n")
    await client[1].drain()


async def hears(client: Stream) -> bytes:
    async with asyncio.timeout(10):
        return (await client[0].readline()).strip()


async def silent(client: Stream) -> bool:
    """Nothing has come by the time that an untouched connection would have had many answers."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await client[0].readexactly(1)
    return True


async def test_bytes_and_ends_pass_in_both_directions(proxy: TcpProxy, echo: Echo, client: Stream) -> None:
    await says(client, b"one")
    assert await hears(client) == b"one"
    assert (proxy.connections, proxy.accepted) == (1, 1)
    client[1].write_eof()
    assert await hears(client) == b""
    await wait_until(lambda: proxy.connections == 0, "the connection is over")
    assert echo.lost == ["closed"]


async def test_what_a_cut_holds_back_flows_on_in_order(proxy: TcpProxy, echo: Echo, client: Stream) -> None:
    await says(client, b"before")
    assert await hears(client) == b"before"
    proxy.cut()
    await says(client, b"one")
    await says(client, b"two")
    assert await silent(client)
    assert echo.heard == [b"before\n"]
    proxy.heal()
    assert [await hears(client), await hears(client)] == [b"one", b"two"]


async def test_one_direction_can_be_cut_alone(proxy: TcpProxy, echo: Echo, client: Stream) -> None:
    proxy.cut(to_server=False)
    await says(client, b"heard")
    await wait_until(lambda: echo.heard == [b"heard\n"], "the server has heard it")
    assert await silent(client)
    proxy.cut(to_client=False)
    assert await hears(client) == b"heard"
    await says(client, b"not heard")
    assert await silent(client)
    assert echo.heard == [b"heard\n"]


async def test_a_connection_made_during_a_cut_hangs_until_it_is_over(proxy: TcpProxy, echo: Echo) -> None:
    proxy.cut(to_server=False)
    late = await asyncio.open_connection(proxy.host, proxy.port)
    await says(late, b"late")
    gone = await asyncio.open_connection(proxy.host, proxy.port)
    await says(gone, b"gone")
    gone[1].close()
    assert await silent(late)
    assert (echo.opened, proxy.connections) == (0, 0)
    proxy.heal()
    assert await hears(late) == b"late"
    assert echo.heard == [b"late\n"]
    late[1].close()


async def test_an_end_is_held_back_by_a_cut_as_bytes_are(proxy: TcpProxy, echo: Echo, client: Stream) -> None:
    await says(client, b"one")
    assert await hears(client) == b"one"
    proxy.cut()
    await says(client, b"two")
    client[1].close()
    other = await asyncio.open_connection(proxy.host, proxy.port)
    assert await silent(other)
    assert (echo.heard, echo.lost, proxy.connections) == ([b"one\n"], [], 1)
    other[1].close()
    proxy.heal()
    await wait_until(lambda: echo.lost, "the server knows")
    assert echo.heard == [b"one\n", b"two\n"]


async def test_both_sides_are_reset(proxy: TcpProxy, echo: Echo, client: Stream) -> None:
    await says(client, b"one")
    assert await hears(client) == b"one"
    proxy.cut()
    assert proxy.reset_all() == 1
    with pytest.raises(ConnectionResetError):
        await hears(client)
    await wait_until(lambda: echo.lost == ["reset"], "the server knows")
    await wait_until(lambda: proxy.connections == 0, "the connection is over")


async def test_stranded_connections_stay_silent_and_new_ones_pass(proxy: TcpProxy, echo: Echo, client: Stream) -> None:
    await says(client, b"one")
    assert await hears(client) == b"one"
    assert proxy.strand() == 1
    await says(client, b"two")
    new = await asyncio.open_connection(proxy.host, proxy.port)
    await says(new, b"three")
    assert await hears(new) == b"three"
    proxy.heal()
    assert await silent(client)
    assert (echo.heard, echo.lost, proxy.connections) == ([b"one\n", b"three\n"], [], 2)
    new[1].close()


async def test_a_connection_without_a_server_is_reset_and_the_next_one_finds_it_back(echo: Echo) -> None:
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    async with TcpProxy("127.0.0.1", port) as proxy:
        lost = await asyncio.open_connection(proxy.host, proxy.port)
        with pytest.raises(ConnectionResetError):
            await hears(lost)
        lost[1].close()
        async with await asyncio.start_server(echo.serve, "127.0.0.1", port):
            found = await asyncio.open_connection(proxy.host, proxy.port)
            await says(found, b"one")
            assert await hears(found) == b"one"
            found[1].close()
            await wait_until(lambda: proxy.connections == 0, "the connection is over")


async def test_a_slow_and_lossy_network_keeps_order_and_loses_nothing(proxy: TcpProxy, client: Stream) -> None:
    proxy.slow(0.005, 0.01)
    proxy.lossy(0.3, 0.02)
    lines = [b"%d" % number for number in range(40)]
    clock = asyncio.get_running_loop().time
    started = clock()
    heard = []
    for line in lines[:10]:
        await says(client, line)
        heard.append(await hears(client))
    assert clock() - started > 10 * 2 * 0.005, "no line may arrive before its delay is over"
    for line in lines[10:]:
        await says(client, line)
    heard += [await hears(client) for _ in lines[10:]]
    assert heard == lines


async def test_a_lossy_network_ends_connections(proxy: TcpProxy, client: Stream) -> None:
    proxy.lossy(reset_chance=1)
    await says(client, b"one")
    with pytest.raises(ConnectionResetError):
        await hears(client)
    assert proxy.resets == 1
    proxy.normal()
    again = await asyncio.open_connection(proxy.host, proxy.port)
    await says(again, b"two")
    assert await hears(again) == b"two"
    again[1].close()


async def test_a_writer_waits_where_the_other_side_does_not_read(proxy: TcpProxy, client: Stream) -> None:
    proxy.cut()
    client[1].write(bytes(BIG))
    waiting = asyncio.ensure_future(client[1].drain())
    await wait_until(lambda: client[1].transport.get_write_buffer_size() < BIG, "the kernel has taken some")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await asyncio.shield(waiting)
    assert client[1].transport.get_write_buffer_size() > BIG / 2
    client[1].transport.abort()
    await asyncio.gather(waiting, return_exceptions=True)
